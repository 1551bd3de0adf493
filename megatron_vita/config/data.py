"""What a run reads."""

from dataclasses import dataclass

from megatron_vita.config.fields import described, require

OVERLONG = ("reject", "cut", "drop_media")
SCOPES = ("mix", "dataset")


@dataclass(kw_only=True)
class DatasetConfig:
    """One source of samples."""

    name: str = described(doc="Name under which its loss is reported.")
    shards: str = described(
        doc="Glob of its .tar shards, local or remote (s3://...); each has its index beside it."
    )
    ratio: float = described(
        1.0, "Share of its samples that an epoch takes; above 1 it goes through them again."
    )
    cap: int = described(0, "Most samples that an epoch takes of it; 0: no limit.")
    max_tiles: int = described(0, "Replaces media.max_tiles for it; 0 does not.")
    max_frames: int = described(0, "Replaces media.max_frames for it; 0 does not.")
    max_fps: float = described(0.0, "Replaces media.max_fps for it; 0 does not.")
    jsonl: str = described("", "JSONL file that `data_tools shard RECIPE` makes its shards from.")
    media: str = described(
        "", "Folder that the media paths of `jsonl` start from; empty: the file's own."
    )

    def __post_init__(self) -> None:
        require(self.ratio > 0, f"dataset {self.name}: ratio is {self.ratio}: it must be positive")
        for field in ("cap", "max_tiles", "max_frames", "max_fps"):
            value = getattr(self, field)
            require(value >= 0, f"dataset {self.name}: {field} is {value}: it must not be negative")


@dataclass(kw_only=True)
class DataConfig:
    """Datasets, packing and reading."""

    train: list[DatasetConfig] = described([], "Datasets to train on.")
    validation: list[DatasetConfig] = described([], "Held-out datasets for the validation loss.")
    plan: str = described(
        "", "Folder of the pack plan that `data_tools plan` writes and training reads."
    )
    seq_length: int = described(4096, "Tokens of a pack, the same for every pack of a run (T).")
    document_alignment: int = described(
        16, "Each document is padded at its end to a multiple of this many tokens."
    )
    isolate_documents: bool = described(
        True,
        "Documents of a pack do not see each other and their positions start at 0; false: a document sees those before "
        "it, positions run on through the pack, and nothing but its end is padded.",
    )
    overlong: str = described(
        "reject",
        "Samples longer than a pack: reject, cut (keep the beginning) or drop_media (keep all text).",
    )
    packing_scope: str = described(
        "mix", "Which documents may share a pack: those of the mix, or of one dataset."
    )
    group_by_cost: bool = described(
        False,
        "Give the packs of a step like costs, for runs whose replicas take one pack or few a step.",
    )
    shuffle_window: int = described(
        4096, "Samples shuffled and packed together; reads stay within a window."
    )
    epochs: int = described(1, "Times that the plan goes through the training data.")
    seed: int = described(1234, "Seed of the plan's order.")
    num_workers: int = described(
        1, "Loader processes of each rank; 0 reads in the training process."
    )
    prefetch: int = described(2, "Packs that a rank's loader processes work on or hold ready.")
    sample_seconds: float = described(
        300.0,
        "A sample whose reading or decoding makes no progress for so long is masked; needs loader processes.",
    )
    cache: str = described(
        "", "Local folder for copies of remote shards; empty: their parts are read as needed."
    )
    cache_gib: float = described(100.0, "Room for those copies, for all processes of a machine.")
    max_damaged: float = described(
        0.01,
        "Share of damaged samples (unreadable, or a frame of theirs is) among those read (1,000 at least) above which a "
        "run stops.",
    )

    def __post_init__(self) -> None:
        for name in ("seq_length", "document_alignment", "shuffle_window", "epochs", "prefetch"):
            require(
                getattr(self, name) >= 1,
                f"data.{name} is {getattr(self, name)}: it must be at least 1",
            )
        for name, known in (("overlong", OVERLONG), ("packing_scope", SCOPES)):
            value = getattr(self, name)
            require(value in known, f"data.{name} is {value!r}; known: {', '.join(known)}")
        require(self.cache_gib > 0, f"data.cache_gib is {self.cache_gib}: it must be positive")
        require(
            self.sample_seconds > 0,
            f"data.sample_seconds is {self.sample_seconds}: it must be positive",
        )
        require(
            0 <= self.max_damaged <= 1,
            f"data.max_damaged is {self.max_damaged}: it must be a share, 0 to 1",
        )
        require(
            self.num_workers >= 0,
            f"data.num_workers is {self.num_workers}: it must not be negative",
        )
        require(
            self.seq_length % self.document_alignment == 0,
            f"data.seq_length {self.seq_length} is not a multiple of data.document_alignment "
            f"{self.document_alignment}; the nearest that is: "
            f"{self.seq_length // self.document_alignment * self.document_alignment or self.document_alignment}",
        )
        names = [dataset.name for dataset in self.train]
        require(len(set(names)) == len(names), f"data.train names a dataset twice: {names}")

    @property
    def padding_multiple(self) -> int:
        """The tokens of each document are padded to a multiple of this."""
        if self.isolate_documents:
            return self.document_alignment
        return 1
