"""Import of Megatron checkpoints, and export of the language model as megatron-core's GPTModel."""

from functools import partial
from pathlib import Path

from torch import Tensor

from megatron_vita.checkpoint import store
from megatron_vita.config import Recipe
from megatron_vita.convert.exporting import read_ours
from megatron_vita.convert.families.folder_formats import ALL_PARTS, CAUSAL
from megatron_vita.convert.families.mapping import location_of
from megatron_vita.convert.families.megatron_tables import gpt_table, long_vita_table
from megatron_vita.convert.folders import new_folder
from megatron_vita.convert.formats.megatron_reader import CoreSource, RanksSource
from megatron_vita.convert.formats.tensors import TensorSource
from megatron_vita.convert.formats.torch_dist_reader import DistSource
from megatron_vita.convert.formats.torch_dist_writer import TensorChunk, write_distributed
from megatron_vita.convert.importing import assert_complete
from megatron_vita.convert.progress import ProgressBar
from megatron_vita.convert.settings.sidecar_files import copy_sidecar_files
from megatron_vita.convert.shapes import stored_shapes
from megatron_vita.convert.transfers import Transfer, export_transfers, import_transfers
from megatron_vita.convert.writing import write_checkpoint
from megatron_vita.errors import CheckpointError


def import_megatron(
    source: Path, destination: Path, *, recipe: Recipe, tokenizer: Path | None
) -> None:
    """Write the checkpoint `destination` from a Megatron checkpoint.

    Args:
        source: a folder of iterations or of ranks (Long-VITA's, or a GPTModel's if
            `model.text_only`), or megatron-core's `torch_dist` of a GPTModel.
        recipe: the shapes of the model.
        tokenizer: Hugging Face folder whose files are copied along.

    Raises:
        CheckpointError: the checkpoint does not fit the recipe; nothing is written.
    """
    if not source.is_dir():
        raise CheckpointError(f"{source}: is no folder")
    model = recipe.model
    if model.text_only:
        parts: tuple[str, ...] = CAUSAL.parts
        rules = gpt_table(model)
    else:
        parts = ALL_PARTS
        rules = long_vita_table(model)
    vocab_size = model.language.vocab_size
    if (source / ".metadata").exists():
        names = [name for rule in rules for name in rule.theirs]
        tensors: TensorSource = CoreSource(source, names=names, vocab_size=vocab_size)
    else:
        tensors = RanksSource(source, vocab_size=vocab_size)
    shapes = stored_shapes(model, parts=parts)
    planned = import_transfers(rules, infos=tensors.infos, shapes=shapes, source=source)
    transfers = [(transfer, tensors) for transfer in planned]
    assert_complete(transfers, shapes)
    sidecar_files = (
        {} if tokenizer is None else {CAUSAL.name: partial(copy_sidecar_files, tokenizer)}
    )
    # The rest of the recipe, such as its data, says nothing about the weights.
    known = Recipe(model=model, text=recipe.text, media=recipe.media)
    write_checkpoint(
        destination, transfers, recipe=known, sidecar_files=sidecar_files, tokenizer=CAUSAL.name
    )


def export_megatron(checkpoint: Path, destination: Path) -> None:
    """Write the language model of a checkpoint as megatron-core's `torch_dist` of a GPTModel, for
    any TP and PP."""
    checkpoint = store.find_checkpoint(checkpoint)
    recipe = store.recipe_of(checkpoint)
    source = DistSource(checkpoint)
    shapes = stored_shapes(recipe.model, parts=CAUSAL.parts)
    transfers = export_transfers(
        gpt_table(recipe.model), infos=source.infos, shapes=shapes, source=checkpoint
    )
    nbytes = sum(transfer.nbytes for transfer in transfers)
    with new_folder(destination) as folder, ProgressBar("writing", nbytes=nbytes) as progress:
        write_distributed(folder, [_chunk(transfer, source, progress) for transfer in transfers])


def _chunk(transfer: Transfer, source: DistSource, progress: ProgressBar) -> TensorChunk:
    def make() -> Tensor:
        # Trimming the vocabulary or taking a layer leaves a view, and torch would save all of its
        # storage.
        return read_ours(source, transfer).contiguous()

    def done() -> None:
        source.release(transfer.location)
        progress.advance(transfer.nbytes)

    (theirs,) = transfer.rule.theirs
    return TensorChunk(
        location=location_of(theirs),
        rows=None,
        whole=transfer.whole,
        dtype=transfer.dtype,
        make=make,
        done=done,
    )
