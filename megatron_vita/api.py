"""The Python interface: models that answer, packs, conversion (docs/api.md).

`megatron_vita/__init__.py` names these functions, and imports this module once one is asked for.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import megatron_vita.platform  # noqa: F401  adapts torch to the machine before megatron-core is imported
from megatron_vita.config import ParallelConfig, Recipe, load_recipe
from megatron_vita.convert.exporting import export_checkpoint
from megatron_vita.convert.families.config_file import CONFIG
from megatron_vita.convert.importing import import_weights
from megatron_vita.data.datasets import Split
from megatron_vita.data.loading.open import open_split
from megatron_vita.data.loading.stream import PackStream
from megatron_vita.errors import ConfigError, DataError, LogitsError
from megatron_vita.inference.engine.engine import Engine
from megatron_vita.inference.engine.options import EngineOptions
from megatron_vita.inference.requests.prompt import MediaFile, Prompt
from megatron_vita.inference.requests.types import SamplingParams
from megatron_vita.text.vocabulary import open_tokenizer

Media = str | Path | MediaFile
GGUF = ".gguf"


class Model:
    """A model in this process that answers questions; `engine` takes many at a time."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def generate(
        self,
        question: str | Prompt,
        *,
        images: Sequence[Media] = (),
        videos: Sequence[Media] = (),
        **sampling: Any,
    ) -> str:
        """Answer a question about images and videos.

        question: literal text, asked after its media; or a Prompt, with media and turns of its own.
        sampling: fields of SamplingParams, such as `temperature` and `max_new_tokens`.

        Raises:
            DataError: the question or its media cannot be used.
            LogitsError: the model's logits are no numbers.
        """
        return "".join(self.stream(question, images=images, videos=videos, **sampling))

    def stream(
        self,
        question: str | Prompt,
        *,
        images: Sequence[Media] = (),
        videos: Sequence[Media] = (),
        **sampling: Any,
    ) -> Iterator[str]:
        """Answer as `generate` does, piece by piece as the text is known."""
        prompt = _prompt(question, images=images, videos=videos)
        for piece in self.engine.stream(prompt, sampling=SamplingParams(**sampling)):
            if piece.error:
                raise (DataError if piece.finish == "error" else LogitsError)(piece.error)
            if piece.choice == 0:
                yield piece.text

    def close(self) -> None:
        """Release the model; on several ranks, end the others."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def load(
    source: str | Path,
    *,
    tokenizer: str | None = None,
    parallel: ParallelConfig | None = None,
    options: EngineOptions | None = None,
) -> Model:
    """Load a checkpoint, the newest of a folder of checkpoints, a Hugging Face folder of a whole
    model, or a GGUF file.

    Hugging Face weights are converted into a temporary folder each time; `from_hf` does it once.

    Raises:
        CheckpointError: there is no such thing, or it is of a model that is not supported.
        ConfigError: Hugging Face weights on more than one process.
    """
    path = Path(source)
    settings: dict[str, Any] = {"tokenizer": tokenizer, "parallel": parallel, "options": options}
    if path.suffix != GGUF and not (path / CONFIG).exists():
        return Model(Engine.from_checkpoint(path, **settings))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"{path}: Hugging Face weights are loaded by one process alone; for several, convert "
            "them first: vita convert from-hf"
        )
    with tempfile.TemporaryDirectory() as folder:
        return Model(Engine.from_checkpoint(from_hf(path, Path(folder, "start")), **settings))


def open_packs(recipe: Recipe | str | Path, *, split: Split = "train") -> PackStream:
    """Open the packs of a recipe's plan: a sequence, each a `Batch` with all of its tiles.

    Raises:
        ConfigError: the recipe names no data or plan.
        DataError: shards, indexes or plan are missing or do not fit; the message says what to run.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    return open_split(recipe, split=split, tokenizer=open_tokenizer(recipe), tile_share=(0, 1))


def from_hf(
    sources: str | Path | Sequence[str | Path],
    destination: str | Path,
    *,
    projector: str = "long_vita",
) -> Path:
    """Write the checkpoint `destination` from a Hugging Face folder or GGUF file, or from several
    that hold the parts of one model.

    projector: kind of a projector that none of them has.

    Raises:
        CheckpointError: with nothing written, for what is wrong.
    """
    several = [sources] if isinstance(sources, str | Path) else sources
    import_weights([Path(source) for source in several], Path(destination), projector=projector)
    return Path(destination)


def to_hf(
    source: str | Path,
    destination: str | Path,
    *,
    folder_format: str = "",
    like: str | Path | None = None,
) -> Path:
    """Write the Hugging Face folder `destination` from a checkpoint, or the newest of a folder.

    folder_format: that of the checkpoint's origin by default. like: a folder whose config and
    tokenizer are taken over.

    Raises:
        CheckpointError: with nothing written, for what is wrong.
    """
    origin = Path(like) if like is not None else None
    export_checkpoint(Path(source), Path(destination), folder_format=folder_format, like=origin)
    return Path(destination)


def _prompt(question: str | Prompt, *, images: Sequence[Media], videos: Sequence[Media]) -> Prompt:
    if isinstance(question, str):
        return Prompt.ask(question, images=_read(images), videos=_read(videos))
    if images or videos:
        raise ConfigError("a Prompt holds its media itself: give none beside it")
    return question


def _read(media: Sequence[Media]) -> list[MediaFile]:
    return [each if isinstance(each, MediaFile) else MediaFile.read(each) for each in media]
