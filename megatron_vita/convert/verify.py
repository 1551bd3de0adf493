"""Verification of a conversion: every tensor in both directions, bit by bit, and the logits of a
forward pass if memory allows."""

import logging
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.config import DataConfig, ParallelConfig, recipe_from_dict
from megatron_vita.convert.exporting import read_ours
from megatron_vita.convert.formats.tensors import TensorSource, same_bits
from megatron_vita.convert.formats.torch_dist_reader import DistSource
from megatron_vita.convert.progress import Progress
from megatron_vita.convert.sources import GGUF
from megatron_vita.convert.transfers import Transfer
from megatron_vita.costs.parameters import model_parameters
from megatron_vita.errors import CheckpointError
from megatron_vita.layout.slicing import IGNORED_LABEL, slice_pack
from megatron_vita.model.build import build_model
from megatron_vita.parallel import groups

PROBE = 32  # tokens
CLOSE = 1e-3  # of the largest logit: fp32 on both sides, whatever the order of sums
logger = logging.getLogger(__name__)


def compare_tensors(transfers: list[tuple[Transfer, TensorSource]], checkpoint: Path) -> None:
    """Raise CheckpointError unless joining theirs gives ours and splitting ours gives theirs, bit
    by bit."""
    source = DistSource(checkpoint)
    with Progress(
        "comparing", nbytes=sum(transfer.nbytes for transfer, _ in transfers)
    ) as progress:
        for transfer, theirs in transfers:
            ours = read_ours(source, transfer)
            if not same_bits(transfer.join(theirs.read), ours):
                raise CheckpointError(
                    f"{checkpoint}: tensor {transfer.location} is not what {transfer.rule.theirs} make up"
                )
            for name, tensor in transfer.split(ours).items():
                if not same_bits(tensor, theirs.read(name)):
                    raise CheckpointError(
                        f"{checkpoint}: tensor {transfer.location} does not come apart into {name}"
                    )
                theirs.release(name)
            source.release(transfer.location)
            progress.advance(transfer.nbytes)


def compare_logits(checkpoint: Path, folder: Path | None) -> str:
    """Run a forward pass of the checkpoint's language model, and of transformers if it can load
    `folder`.

    Returns:
        A sentence that tells the result.

    Raises:
        CheckpointError: logits are not finite, or differ from those of transformers.
    """
    recipe = recipe_from_dict(store.read_manifest(checkpoint)["recipe"])
    needed = model_parameters(recipe.model) * 4 * (1 if folder is None else 2)
    free = psutil.virtual_memory().available
    if needed > 0.8 * free:
        return (
            f"no forward pass: it needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free"
        )
    ids = torch.arange(PROBE) % recipe.model.language.vocab_size
    ours = _our_logits(checkpoint, ids)
    if not bool(torch.isfinite(ours).all()):
        raise CheckpointError(f"{checkpoint}: a forward pass gives logits that are NaN or infinite")
    theirs = _their_logits(folder, ids) if folder is not None else None
    if theirs is None:
        return "one forward pass gave finite logits"
    theirs = theirs[:, : ours.shape[1]]
    apart = float((ours[:, : theirs.shape[1]] - theirs).abs().max() / theirs.abs().max())
    if not apart <= CLOSE:
        raise CheckpointError(
            f"{checkpoint}: logits are {apart:.1e} (of the largest) away from those of transformers for {folder}; "
            f"{CLOSE:.0e} is allowed"
        )
    return f"one forward pass gave transformers' logits, at most {apart:.1e} of the largest apart"


@torch.no_grad()
def _our_logits(checkpoint: Path, ids: Tensor) -> Tensor:
    """Logits [t, V] of a text in fp32."""
    platform.initialize_process()
    recipe = recipe_from_dict(store.read_manifest(checkpoint)["recipe"])
    recipe.parallel = ParallelConfig()
    recipe.data = DataConfig(seq_length=PROBE)
    recipe.training.bf16 = False
    groups.initialize_groups(recipe.parallel)
    model = build_model(recipe).eval()
    store.load_weights([model], checkpoint)
    pack = slice_pack(
        ids,
        labels=torch.full_like(ids, IGNORED_LABEL),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        placements=torch.zeros(0, dtype=torch.int64),
        frames=torch.zeros(0, dtype=torch.bool),
        rows_per_tile=recipe.model.vision.image_token_length,
        layout=groups.rank_layout(),
    )
    size = recipe.model.vision.image_size
    return model(
        torch.zeros(0, 3, size, size),
        pack.to(platform.device()),
        wanted_rows=torch.arange(len(ids)),
    ).cpu()


@torch.no_grad()
def _their_logits(folder: Path, ids: Tensor) -> Tensor | None:
    """Logits [t, V] of transformers; None for a model that it cannot load without running the
    folder's code."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    place: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if folder.suffix == GGUF:
        folder, place = folder.parent, place | {"gguf_file": folder.name}
    try:
        config = AutoConfig.from_pretrained(folder, **place)
        whole = hasattr(config, "vision_config")
        loader = AutoModelForImageTextToText if whole else AutoModelForCausalLM
        model = loader.from_pretrained(folder, dtype=torch.float32, **place).eval()
    except (ValueError, KeyError, OSError) as error:
        logger.warning(
            "%s: transformers cannot load it, so logits are not compared: %s", folder, error
        )
        return None
    return model(input_ids=ids[None]).logits[0].float()
