"""Megatron checkpoints as tensor sources: one file per rank, or megatron-core's `torch_dist`."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_vita.convert.families.mapping import location_of
from megatron_vita.convert.families.megatron_tables import VISION
from megatron_vita.convert.formats.pickle_reader import load_pickle
from megatron_vita.convert.formats.tensors import TensorInfo, same_bits
from megatron_vita.convert.formats.torch_dist_reader import DistSource
from megatron_vita.errors import CheckpointError

FILE = "model_optim_rng.pt"
TRACKER = "latest_checkpointed_iteration.txt"
_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\..*)")
_VISION_ENDS = re.compile(
    r"\.(decoder\.layers\..*|class_token|position_embeddings\.weight|conv1\.\w+|pre_proj_layernorm\.\w+"
    r"|linear_fc[12]\.\w+)$"
)
# Transformer Engine's state, and buffers that are computed anew.
_NO_WEIGHTS = ("._extra_state", ".unused", "rotary_pos_emb.inv_freq")
_OTHER_NAMES = {  # of layers without Transformer Engine
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "input_layernorm.bias": "self_attention.linear_qkv.layer_norm_bias",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "pre_mlp_layernorm.bias": "mlp.linear_fc1.layer_norm_bias",
}
# How Megatron-LM shards its layers; tensors that are not listed are equal on all TP ranks.
_SPLIT = {  # ends of names of tensors that are split over TP, and along which axis
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_fc1.weight": 0,
    "linear_fc1.bias": 0,
    "linear_proj.weight": 1,
    "linear_fc2.weight": 1,
}
Stage = list[dict[str, Tensor]]  # the tensors of each TP rank, by name


class RanksSource:
    """Tensors of `iter_*/mp_rank_XX[_XXX]/model_optim_rng.pt`, merged over tensor- and
    pipeline-parallel ranks."""

    def __init__(self, folder: Path, *, vocab_size: int) -> None:
        """Load all ranks; `vocab_size` is the number of rows without padding.

        Raises:
            CheckpointError: the ranks do not fit together.
        """
        self.folder = _iteration(folder)
        stages = [[_tensors(file) for file in files] for files in _rank_files(self.folder)]
        self._parts: dict[str, list[Tensor]] = {}
        self._files: dict[str, Path] = {}
        self._vocab_size = vocab_size
        first = 0
        for stage, files in zip(stages, _rank_files(self.folder), strict=True):
            # A rank counts its layers from 0; the checkpoint needs the position in the whole model.
            first += self._add(stage, files[0], first_layer=first)
        self._infos = {name: self._info(name, parts) for name, parts in self._parts.items()}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """See TensorSource."""
        return self._infos

    def read(self, name: str) -> Tensor:
        """Merge the shards of a tensor."""
        parts = self._parts[name]
        axis = _axis(name)
        if axis is None or len(parts) == 1:
            return self._trim(name, parts[0])
        # A gated MLP keeps gate and up in one matrix, so each rank has a half of both.
        if name.endswith("linear_fc1.weight") and not name.startswith(VISION):
            halves = [part.chunk(2) for part in parts]  # of each rank: gate, up
            return torch.cat([half[i] for i in (0, 1) for half in halves])
        return self._trim(name, torch.cat(parts, dim=axis))

    def release(self, name: str) -> None:
        """See TensorSource. torch owns the memory map and keeps its pages."""

    def _add(self, stage: Stage, file: Path, *, first_layer: int) -> int:
        """Add a stage's tensors under global layer numbers; return its number of language model
        layers."""
        layers = set()
        for given in stage[0]:
            if given.endswith(_NO_WEIGHTS) or given == "unused":
                continue
            name = _plain_name(given)
            if (found := _LAYER.fullmatch(name)) is not None:
                layers.add(int(found[2]))
                name = f"{found[1]}{int(found[2]) + first_layer}{found[3]}"
            # Files of different runs may lie in one folder.
            lacking = next((i for i, tensors in enumerate(stage) if given not in tensors), None)
            if lacking is not None:
                raise CheckpointError(
                    f"{file}: has tensor {given}, but tensor-parallel rank {lacking} has not"
                )
            parts = [tensors[given] for tensors in stage]
            if _axis(name) is None and not all(same_bits(part, parts[0]) for part in parts):
                raise CheckpointError(
                    f"{file}: tensor {given} differs between tensor-parallel ranks"
                )
            # the last stage of a tied model has the embedding again
            self._parts.setdefault(name, parts)
            self._files.setdefault(name, file)
        return len(layers)

    def _info(self, name: str, parts: list[Tensor]) -> TensorInfo:
        shape = list(parts[0].shape)
        axis = _axis(name)
        if axis is not None:
            shape[axis] = sum(part.shape[axis] for part in parts)
        if _is_vocabulary(name):
            shape[0] = min(shape[0], self._vocab_size)
        return TensorInfo(file=self._files[name], dtype=parts[0].dtype, shape=tuple(shape))

    def _trim(self, name: str, tensor: Tensor) -> Tensor:
        if _is_vocabulary(name):
            return tensor[: self._vocab_size]
        return tensor


def _is_vocabulary(name: str) -> bool:
    return name.endswith(("word_embeddings.weight", "output_layer.weight"))


def _axis(name: str) -> int | None:
    if (
        name.startswith(VISION)
        and ".layers." not in name
        and name.split(".")[-2].startswith("linear_")
    ):
        # the projector's
        if "fc1" in name:
            return 0
        return 1
    return next(
        (axis for ending, axis in _SPLIT.items() if f".{name}".endswith(f".{ending}")), None
    )


def _plain_name(given: str) -> str:
    """Normalize a name to that in `long_vita_table`: without Transformer Engine's variants, and
    without the prefixes inside the vision tower and projector."""
    for old, new in _OTHER_NAMES.items():
        given = given.replace(old, new)
    if not given.startswith(VISION):
        return given
    found = _VISION_ENDS.search(given)
    if found:
        return VISION + found[1]
    return given


def _iteration(folder: Path) -> Path:
    """Folder of one iteration: `folder` itself, or the newest inside it."""
    if any(_RANK.fullmatch(entry.name) for entry in folder.iterdir()):
        return folder
    tracker = folder / TRACKER
    if not tracker.exists():
        raise CheckpointError(f"{folder}: has neither folders mp_rank_* nor {TRACKER}")
    said = tracker.read_text().strip()
    # Megatron's converters write the word `release` in place of an iteration.
    name = said
    if said.isdigit():
        name = f"iter_{int(said):07d}"
    if not (folder / name).is_dir():
        raise CheckpointError(f"{tracker}: names iteration {said}, but there is no folder {name}")
    return folder / name


def _rank_files(folder: Path) -> list[list[Path]]:
    """Files by pipeline rank, then by tensor-parallel rank.

    Raises:
        CheckpointError: a rank is missing.
    """
    ranks: dict[tuple[int, int], Path] = {}
    for entry in folder.iterdir():
        if (found := _RANK.fullmatch(entry.name)) is not None:
            ranks[int(found[2] or 0), int(found[1])] = entry / FILE
    stages = 1 + max(stage for stage, _ in ranks)
    width = 1 + max(rank for _, rank in ranks)
    for stage in range(stages):
        for rank in range(width):
            if (stage, rank) not in ranks:
                raise CheckpointError(
                    f"{folder}: has no tensor-parallel rank {rank} of pipeline rank {stage}"
                )
    return [[ranks[stage, rank] for rank in range(width)] for stage in range(stages)]


def _tensors(file: Path) -> dict[str, Tensor]:
    # Megatron pickles its command line arguments beside the tensors.
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = load_pickle(file)
    model = loaded.get("model") if isinstance(loaded, dict) else None
    if not isinstance(model, dict):
        raise CheckpointError(f"{file}: has no `model`: a dictionary of tensors is needed")
    return {name: value for name, value in model.items() if isinstance(value, Tensor)}


class CoreSource:
    """Tensors of megatron-core's `torch_dist`, under GPTModel's names of single layers."""

    def __init__(self, folder: Path, *, names: list[str], vocab_size: int) -> None:
        """Offer only the tensors in `names`; others are not read."""
        self._source = DistSource(folder)
        self._vocab_size = vocab_size
        self._infos = {
            name: self._info(name) for name in names if location_of(name).key in self._source.infos
        }

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """See TensorSource."""
        return self._infos

    def read(self, name: str) -> Tensor:
        """See TensorSource."""
        tensor = self._source.read(location_of(name))
        if _is_vocabulary(name):
            return tensor[: self._vocab_size]
        return tensor

    def release(self, name: str) -> None:
        """See TensorSource."""
        self._source.release(location_of(name))

    def _info(self, name: str) -> TensorInfo:
        location = location_of(name)
        info = self._source.infos[location.key]
        shape = list(info.shape)
        if location.layer is not None:
            shape = shape[1:]
        if _is_vocabulary(name):
            shape[0] = min(shape[0], self._vocab_size)
        return TensorInfo(file=info.file, dtype=info.dtype, shape=tuple(shape))
