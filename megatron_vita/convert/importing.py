"""Import of Hugging Face folders and GGUF files into a distributed checkpoint."""

import dataclasses
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vita.config import (
    DataConfig,
    MediaConfig,
    ModelConfig,
    ProjectorConfig,
    Recipe,
    replaced,
)
from megatron_vita.convert.export_format import prospect
from megatron_vita.convert.families.folder_formats import (
    ALL_PARTS,
    CAUSAL,
    INTERNVL_HF,
)
from megatron_vita.convert.families.mapping import Rule
from megatron_vita.convert.formats.tensors import TensorSource
from megatron_vita.convert.initialized_parts import InitializedProjector, ResizeVocab
from megatron_vita.convert.settings.export_code import has_our_code
from megatron_vita.convert.settings.prompts import (
    Prompts,
    append_tokens,
    check_image_token,
    check_media_tokens,
    read_prompts,
)
from megatron_vita.convert.shapes import stored_shapes
from megatron_vita.convert.sources import OpenedSource, open_source
from megatron_vita.convert.transfers import Transfer, import_transfers
from megatron_vita.convert.writing import write_checkpoint
from megatron_vita.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """A checked import: everything is known but the values of tensors."""

    recipe: Recipe
    sources: list[OpenedSource]
    transfers: list[tuple[Transfer, TensorSource]]
    prompts: Prompts

    @property
    def language(self) -> OpenedSource:
        """Source of the language model."""
        return _source_of("language_model", self.sources)

    def write_language_sidecar_files(self, folder: Path) -> None:
        """Write the language model's sidecar files, with the special tokens that prompts need in
        its tokenizer."""
        self.language.write_sidecar_files(folder)
        assert self.prompts.tokenizer is not None
        append_tokens(folder, self.prompts.tokenizer, names={})


def plan_import(sources: list[OpenedSource], *, projector: str) -> ImportPlan:
    """Combine sources to one model; a projector that no source has is initialized.

    Raises:
        CheckpointError: a part is missing or given twice, or a tensor does not fit.
    """
    model, fresh = _combine(sources, projector)
    language = _source_of("language_model", sources)
    prompts = _prompts_of(language, model)
    # Prompts come first: their special tokens decide the size of the vocabulary.
    model = _with_rows(model, prompts, language)
    parts = {part for source in sources for part in source.folder_format.parts} | (
        {"projector"} if fresh else set()
    )
    shapes = stored_shapes(model, parts=tuple(parts))
    transfers: list[tuple[Transfer, TensorSource]] = []
    for source in sources:
        rules = [_grow(rule, source, model) for rule in source.folder_format.table(source.model)]
        planned = import_transfers(rules, infos=source.wanted(), shapes=shapes, source=source.path)
        transfers += [(transfer, source.tensors) for transfer in planned]
    if fresh:
        _tell_of_projector(model)
        # The projector takes the type of the other weights.
        made = InitializedProjector(model, dtype=transfers[-1][0].dtype)
        planned = import_transfers(
            made.rules, infos=made.infos, shapes=shapes, source=Path("fresh projector")
        )
        transfers += [(transfer, made) for transfer in planned]
    assert_complete(transfers, shapes)
    recipe = _recipe_of(model, sources, prompts)
    return ImportPlan(recipe=recipe, sources=sources, transfers=transfers, prompts=prompts)


def _tell_of_projector(model: ModelConfig) -> None:
    """Say before anything is trained who will load the exports of a model from parts."""
    logger.warning(
        "the projector is initialized, of kind %s: %s", model.projector.kind, prospect(model)
    )


def _combine(sources: list[OpenedSource], projector: str) -> tuple[ModelConfig, bool]:
    """Combine the parts to a model; the flag tells that its projector must be initialized."""
    owner: dict[str, OpenedSource] = {}
    for source in sources:
        for part in source.folder_format.parts:
            if part in owner:
                raise CheckpointError(
                    f"{owner[part].path} and {source.path} both hold a {part}: one is needed"
                )
            owner[part] = source
    if "vision_model" not in owner:
        return owner["language_model"].model, False
    if "language_model" not in owner:
        raise CheckpointError(
            f"{owner['vision_model'].path}: holds a vision tower alone; name the folder of a language model, too"
        )
    fresh = "projector" not in owner
    if fresh:
        config = replaced(ProjectorConfig(), {"kind": projector})
    else:
        config = owner["projector"].model.projector
    model = ModelConfig(
        vision=owner["vision_model"].model.vision,
        projector=config,
        language=owner["language_model"].model.language,
    )
    return model, fresh


def _source_of(part: str, sources: list[OpenedSource]) -> OpenedSource:
    return next(source for source in sources if part in source.folder_format.parts)


def _prompts_of(language: OpenedSource, model: ModelConfig) -> Prompts:
    """Prompt format of the model. A language model combined with a tower gets the placeholders that
    go with its projector."""
    alone = language.folder_format.parts == CAUSAL.parts
    prompts = read_prompts(
        language.folder_format,
        language.config,
        write_sidecar_files=language.write_sidecar_files,
        with_media=model.projector.kind if alone and not model.text_only else "",
    )
    if language.folder_format is INTERNVL_HF and prompts.tokenizer is not None:
        check_image_token(language.config, prompts.tokenizer)
    if has_our_code(language.config.values) and prompts.tokenizer is not None:
        check_media_tokens(language.config, prompts)
    return prompts


def _with_rows(model: ModelConfig, prompts: Prompts, language: OpenedSource) -> ModelConfig:
    """Grow the word embedding to a row for every entry of the tokenizer."""
    rows = model.language.vocab_size
    if prompts.entries <= rows:
        return model
    logger.warning(
        "%s: the word embedding has %d rows and the tokenizer %d entries%s: rows are added",
        language.path,
        rows,
        prompts.entries,
        f" with {', '.join(prompts.appended)}" if prompts.appended else "",
    )
    grown = dataclasses.replace(model.language, vocab_size=prompts.entries)
    return dataclasses.replace(model, language=grown)


def _grow(rule: Rule, source: OpenedSource, model: ModelConfig) -> Rule:
    """Let a rule add rows to the vocabulary where the model has more than the source."""
    rows = model.language.vocab_size
    if (
        "language_model" not in source.folder_format.parts
        or source.model.language.vocab_size == rows
    ):
        return rule
    # Only these two have a row per token.
    if not rule.ours.endswith(("word_embeddings.weight", "output_layer.weight")):
        return rule
    return dataclasses.replace(
        rule, reshape=ResizeVocab(rows=rows, given=source.model.language.vocab_size)
    )


def _recipe_of(model: ModelConfig, sources: list[OpenedSource], prompts: Prompts) -> Recipe:
    """Recipe of the sources' settings. Its sequence length is the model's context: prompts are
    limited to it where nothing else sets a limit."""
    language = _source_of("language_model", sources)
    data = DataConfig()
    # A sequence length must be a multiple of the alignment, and the context must not be exceeded.
    longest = language.longest // data.document_alignment * data.document_alignment
    return Recipe(
        model=model,
        text=prompts.text,
        media=_media_of(sources, projector=model.projector.kind),
        generation=language.generation,
        data=DataConfig(seq_length=longest or data.seq_length),
    )


def _media_of(sources: list[OpenedSource], *, projector: str) -> MediaConfig:
    """Media settings of a whole model; of a tower alone, its normalization."""
    tower = next(
        (source for source in sources if "vision_model" in source.folder_format.parts), None
    )
    if tower is None:
        return MediaConfig()
    whole = tower.folder_format.parts == ALL_PARTS
    # Tiling and frames belong to the projector and the prompts that it was trained with.
    if whole:
        return tower.media
    # A new model in InternVL's format resizes frames as the processor does that is exported with it.
    fit = "squash" if projector == INTERNVL_HF.projector else MediaConfig.video_fit
    return MediaConfig(normalization=tower.media.normalization, video_fit=fit)


def assert_complete(
    transfers: list[tuple[Transfer, TensorSource]], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Assert that the transfers cover the model exactly once."""
    given: dict[str, int] = {}
    for transfer, _ in transfers:
        given[transfer.location.key] = (
            given.get(transfer.location.key, 0) + torch.Size(transfer.shape).numel()
        )
    assert given == {key: torch.Size(shape).numel() for key, shape in shapes.items()}, (
        "a table does not cover the model"
    )


def import_weights(
    paths: Sequence[Path], destination: Path, *, projector: str, ignored: Collection[str] = ()
) -> ImportPlan:
    """Write the checkpoint `destination` from folders or GGUF files that hold the parts of one
    model.

    Args:
        projector: kind of the projector to initialize if no source has one.
        ignored: names of unknown config fields that have no effect.

    Raises:
        CheckpointError: a source cannot be imported; nothing is written.
    """
    opened = [open_source(path, ignored=ignored) for path in paths]
    plan = plan_import(opened, projector=projector)
    sidecar_files = {
        source.folder_format.name: source.write_sidecar_files for source in plan.sources
    }
    if plan.prompts.appended:
        sidecar_files[plan.language.folder_format.name] = plan.write_language_sidecar_files
    write_checkpoint(
        destination,
        plan.transfers,
        recipe=plan.recipe,
        sidecar_files=sidecar_files,
        tokenizer=plan.language.folder_format.name,
    )
    return plan
