"""Datasets, packing and loading of a run."""

from dataclasses import dataclass
from typing import Literal

from megatron_vita.config.parsing.fields import check_fields, described, require

OverlongPolicy = Literal["reject", "cut", "drop_media"]


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One dataset: its shards, its share of an epoch and its own media limits."""

    name: str = described(doc="Name of the dataset in the plan, logs and metrics.")
    shards: str = described(
        doc="Glob of its .tar shards, local or remote (s3://...), with their indexes beside them."
    )
    ratio: float = described(
        1.0, "Fraction of its samples in an epoch; above 1, samples are repeated.", gt=0
    )
    cap: int = described(0, "Maximum number of its samples in an epoch; 0: no limit.", ge=0)
    max_tiles: int = described(0, "media.max_tiles for this dataset; 0: the recipe's.", ge=0)
    max_frames: int = described(0, "media.max_frames for this dataset; 0: the recipe's.", ge=0)
    max_fps: float = described(0.0, "media.max_fps for this dataset; 0: the recipe's.", ge=0)
    jsonl: str = described("", "JSONL file from which `vita data shard RECIPE` writes the shards.")
    media: str = described(
        "", "Folder to which media paths in `jsonl` are relative; empty: the folder of the file."
    )

    def __post_init__(self) -> None:
        # A list's item does not know its index; the name says which one it is.
        check_fields(self, f"dataset {self.name}: ")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Datasets, packing and loader processes."""

    train: list[DatasetConfig] = described([], "Datasets to train on.")
    validation: list[DatasetConfig] = described([], "Held-out datasets for the validation loss.")
    plan: str = described(
        "", "Folder of the pack plan, written by `vita data plan` and read in training."
    )
    seq_length: int = described(4096, "Tokens of every pack (T).", ge=1)
    document_alignment: int = described(
        16, "Length of each document in a pack is padded to a multiple of this.", ge=1
    )
    isolate_documents: bool = described(
        True,
        "Restrict attention to each document, with positions from 0; false: documents attend to "
        "earlier ones of the pack, positions continue, and only the end of the pack is padded.",
    )
    overlong: OverlongPolicy = described(
        "reject",
        "Samples longer than a pack: reject, cut (keep the beginning) or drop_media (keep all the "
        "text, leave out media).",
    )
    packing_scope: Literal["mix", "dataset"] = described(
        "mix",
        "Documents that may share a pack: mix (of all datasets) or dataset (of the same one).",
    )
    group_by_cost: bool = described(
        False,
        "Group packs of similar cost into a step; for replicas that compute few packs a step.",
    )
    shuffle_window: int = described(
        4096, "Samples that are packed together; shard reads stay within such a window.", ge=1
    )
    epochs: int = described(1, "Epochs of the training data in the plan.", ge=1)
    seed: int = described(1234, "Seed of the sample order.")
    num_workers: int = described(
        1, "Loader processes of each rank; 0: read in the training process.", ge=0
    )
    prefetch: int = described(2, "Packs that a rank's loader processes read ahead.", ge=1)
    sample_seconds: float = described(
        300.0,
        "Timeout in seconds after which a sample that makes no progress is masked; needs loader "
        "processes.",
        gt=0,
    )
    cache: str = described(
        "", "Local cache folder for remote shards; empty: read byte ranges as needed."
    )
    cache_gib: float = described(
        100.0, "Size limit of `cache` in GiB, over all processes of a host.", gt=0
    )
    max_damaged: float = described(
        0.01,
        "Fraction of damaged samples (unreadable, or with undecodable frames), of at least 1,000 "
        "samples, above which a run stops.",
        ge=0,
        le=1,
    )

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        # The tail of a pack is one more document, whose length must be aligned as well.
        below = self.seq_length // self.document_alignment * self.document_alignment
        require(
            self.seq_length % self.document_alignment == 0,
            f"data.seq_length {self.seq_length} is not a multiple of data.document_alignment "
            f"{self.document_alignment}; the nearest that is: {below or self.document_alignment}",
        )
        # Plans and metrics know a dataset by its name.
        names = [dataset.name for dataset in self.train]
        require(len(set(names)) == len(names), f"data.train names a dataset twice: {names}")

    @property
    def padding_multiple(self) -> int:
        """Multiple to which the tokens of each document are padded."""
        if self.isolate_documents:
            return self.document_alignment
        return 1
