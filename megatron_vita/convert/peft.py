"""Adapters in the folder form of PEFT: `adapter_config.json` and `adapter_model.safetensors`."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from megatron_vita.checkpoint import store
from megatron_vita.config import AdaptedMap, LinearMap, Recipe, linear_maps
from megatron_vita.convert.adapters import (
    AdapterCheckpoint,
    base_weight,
    open_base,
    write_adapters,
)
from megatron_vita.convert.families.adapters import (
    Matrices,
    join_adapter,
    join_norms,
    split_adapter,
    split_norms,
)
from megatron_vita.convert.families.folder_formats import (
    CAUSAL,
    INTERNVL_HF,
    FolderFormat,
    format_named,
)
from megatron_vita.convert.folders import new_folder
from megatron_vita.convert.formats.safetensors_reader import SafetensorsSource
from megatron_vita.convert.formats.tensors import check_finite
from megatron_vita.convert.formats.torch_dist_reader import DistSource
from megatron_vita.errors import CheckpointError, ConfigError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_MAGNITUDE = "lora_magnitude_vector"
_PREFIX = "base_model.model."
_IN_MEMORY = {  # beginnings of names in files, and in transformers' models
    INTERNVL_HF.name: {
        "language_model.lm_head.": "lm_head.",
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
}
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "use_qalora": (False, None),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    # Others subtract the initial update from the base's weights.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
"""Fields that change what adapters compute, and their values that are known here."""


class _Names:
    """Names of single maps in a format's model, by their names here."""

    def __init__(self, recipe: Recipe, folder_format: FolderFormat) -> None:
        self.format = folder_format
        table = {rule.ours: rule for rule in folder_format.table(recipe.model)}
        renamed = _IN_MEMORY.get(folder_format.name, {})
        self.theirs: dict[str, str] = {}
        self.joint: set[str] = set()  # of our maps that the format joins too
        for linear in linear_maps(recipe.model):
            rule = table.get(f"{linear.name}.weight")
            if rule is None:
                continue
            if len(rule.theirs) != len(linear.pieces):
                self.joint.add(linear.name)
                continue
            for piece, name in zip(linear.pieces, rule.theirs, strict=True):
                self.theirs[piece.name] = _renamed(name.removesuffix(".weight"), renamed)

    def of(self, linear: LinearMap, piece: str) -> str:
        """Return the name of a map's piece.

        Raises:
            CheckpointError: the format has no such map.
        """
        if piece in self.theirs:
            return self.theirs[piece]
        reason = "has no such map"
        if linear.name in self.joint:
            reason = "joins query, key and value in one map, which have adapters of their own here"
        raise CheckpointError(
            f"format {self.format.name}: {reason}: {piece}; name another with --format"
        )


def _renamed(name: str, beginnings: dict[str, str]) -> str:
    for old, new in beginnings.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def export_adapters(
    adapters: Path, destination: Path, *, folder_format: str = "", base: Path | None = None
) -> int:
    """Write adapters as PEFT's folder, completely or not at all; return their number.

    Args:
        adapters: checkpoint of adapters, or a folder of such.
        destination: folder to write.
        folder_format: of the base that they will be loaded on; empty: the language model alone, or
            transformers' InternVL where other parts have adapters.
        base: checkpoint of the weights beside DoRA's adapters, whose norms PEFT wants whole; None
            for the one they were trained on.

    Raises:
        CheckpointError: weights beside the adapters were trained, the format lacks a map, or the
            base is missing or another one.
    """
    opened = AdapterCheckpoint.open(adapters)
    if beside := opened.trained_beside():
        raise CheckpointError(
            f"{opened.path}: {len(beside)} tensors, such as {min(beside)}, were trained fully beside the adapters, for "
            "which PEFT's folder has no place; write the whole model: merge-lora, then to-hf"
        )
    chosen = _format_for(opened, folder_format)
    names = _Names(opened.recipe, chosen)
    tensors: dict[str, Tensor] = {}
    for adapted in opened.adapted:
        for piece, (a, b) in split_adapter(adapted, *opened.read(adapted)).items():
            name = names.of(adapted.linear, piece)
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.contiguous()
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.contiguous()
    count = len(tensors) // 2
    if opened.recipe.lora.dora:
        tensors |= _magnitudes(opened, names, open_base(opened, base).source)
    with new_folder(destination) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config = _config_of(opened, names)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return count


def _magnitudes(opened: AdapterCheckpoint, names: _Names, base: DistSource) -> dict[str, Tensor]:
    """Return PEFT's magnitudes: the norms of the base's rows, and what training added."""
    tensors: dict[str, Tensor] = {}
    for adapted in opened.adapted:
        change = opened.read_norms(adapted)
        assert change is not None, "adapters of DoRA"
        norms = base_weight(base, adapted).norm(dim=1) + change.flatten()
        for piece, values in split_norms(adapted, norms).items():
            tensors[f"{_PREFIX}{names.of(adapted.linear, piece)}.{_MAGNITUDE}"] = values
    return tensors


def _format_for(opened: AdapterCheckpoint, name: str) -> FolderFormat:
    if name:
        return format_named(name)
    if all(adapted.linear.part == "language_model" for adapted in opened.adapted):
        return CAUSAL
    return INTERNVL_HF


def _config_of(opened: AdapterCheckpoint, names: _Names) -> dict[str, Any]:
    lora = opened.recipe.lora
    alpha = lora.alpha
    # Other readers want a whole number.
    if alpha == int(alpha):
        alpha = int(alpha)
    chosen = {
        names.theirs[adapted.linear.pieces[i].name]
        for adapted in opened.adapted
        for i in adapted.chosen
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if names.format is CAUSAL else None,
        "base_model_name_or_path": opened.base["path"] or None,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": _shortest(chosen, set(names.theirs.values())),
    }


def _shortest(chosen: set[str], known: set[str]) -> list[str]:
    """Return last names where they choose the same maps, else full names."""
    ends = {name.rpartition(".")[2] for name in chosen}
    if {name for name in known if name.rpartition(".")[2] in ends} == chosen:
        return sorted(ends)
    return sorted(chosen)


def import_adapters(folder: Path, destination: Path, *, base: Path) -> int:
    """Write PEFT's folder of adapters as a checkpoint of adapters; return their number.

    Args:
        folder: PEFT's folder.
        destination: checkpoint to write.
        base: checkpoint of the weights that they belong to.

    Raises:
        CheckpointError: the folder's adapters are of another kind, or not of this model.
    """
    config = _read_config(folder)
    whole = store.find_checkpoint(base)
    recipe = store.recipe_of(whole)
    source = SafetensorsSource(folder / WEIGHTS)
    found = _maps_in(source, recipe, has_norms=bool(config.get("use_dora")))
    adapted_recipe = _recipe_with(recipe, config, list(found))
    theirs = {piece: f"{_PREFIX}{name}" for piece, name in found.items()}

    def matrices(adapted: AdaptedMap) -> Matrices:
        read = {}
        for piece in (adapted.linear.pieces[i] for i in adapted.chosen):
            read[piece.name] = _read_matrices(
                source,
                theirs[piece.name],
                a_shape=(config["r"], adapted.linear.inputs),
                b_shape=(piece.outputs, config["r"]),
            )
        return join_adapter(adapted, read)

    weights = DistSource(whole)

    def norms(adapted: AdaptedMap) -> Tensor:
        names = [adapted.linear.pieces[i].name for i in adapted.chosen]
        read = {name: _read_magnitude(source, f"{theirs[name]}.{_MAGNITUDE}") for name in names}
        of_base = split_norms(adapted, base_weight(weights, adapted).norm(dim=1))
        _check_magnitudes(read, of_base, folder=folder)
        return join_norms(adapted, {name: read[name] - of_base[name] for name in names})

    write_adapters(
        destination,
        adapted_recipe,
        base={"path": str(whole.absolute()), "stamp": ""},
        matrices=matrices,
        norms=norms if adapted_recipe.lora.dora else None,
    )
    return len(found)


def _read_magnitude(source: SafetensorsSource, name: str) -> Tensor:
    """Read the magnitudes of a map in fp32."""
    if name not in source.infos:
        file = next(iter(source.infos.values())).file
        raise CheckpointError(f"{file}: has no tensor {name}, which use_dora of {CONFIG} needs")
    tensor = source.read(name).float()
    check_finite(tensor, name=name, file=source.infos[name].file)
    return tensor


def _check_magnitudes(read: dict[str, Tensor], of_base: dict[str, Tensor], *, folder: Path) -> None:
    for name, values in read.items():
        wanted = of_base[name].shape
        if values.shape != wanted:
            raise CheckpointError(
                f"{folder / WEIGHTS}: the magnitudes of {name} are {list(values.shape)}; "
                f"{list(wanted)} is needed for the base's map"
            )


def _read_matrices(
    source: SafetensorsSource, name: str, *, a_shape: tuple[int, int], b_shape: tuple[int, int]
) -> Matrices:
    """Read A and B of a map in fp32.

    Raises:
        CheckpointError: they have other shapes than the rank and the base's map need, or numbers
            that are not finite.
    """
    read = []
    for letter, shape in (("A", a_shape), ("B", b_shape)):
        tensor_name = f"{name}.lora_{letter}.weight"
        file = source.infos[tensor_name].file
        tensor = source.read(tensor_name).float()
        if tensor.shape != shape:
            raise CheckpointError(
                f"{file}: {tensor_name} is {list(tensor.shape)}; {list(shape)} is needed for r of "
                f"{CONFIG} and the base's map"
            )
        check_finite(tensor, name=tensor_name, file=file)
        read.append(tensor)
    return read[0], read[1]


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    for name, known in _MUST_BE.items():
        value = config.get(name)
        if name in config and value not in known:
            raise CheckpointError(f"{path}: {name} is {value!r}; only {known[0]!r} is supported")
    if "peft_type" not in config:
        raise CheckpointError(f"{path}: has no peft_type; 'LORA' is supported")
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise CheckpointError(f"{path}: r is {config.get('r')!r}: a positive integer is needed")
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, (int, float)) or not alpha > 0:
        raise CheckpointError(f"{path}: lora_alpha is {alpha!r}: a positive number is needed")
    return dict(config)


def _maps_in(source: SafetensorsSource, recipe: Recipe, *, has_norms: bool) -> dict[str, str]:
    """Return PEFT's names of the adapted maps by ours, in the format that has all of them.

    Raises:
        CheckpointError: no format has all, or a tensor is no adapter's.
    """
    names = {_map_of(tensor, source, has_norms=has_norms) for tensor in source.infos}
    lacking: list[set[str]] = []
    for folder_format in (CAUSAL, INTERNVL_HF):
        known = _Names(recipe, folder_format).theirs
        ours = {theirs: piece for piece, theirs in known.items()}
        if names <= ours.keys():
            return {ours[name]: name for name in sorted(names)}
        lacking.append(names - ours.keys())
    # Of the format that has most of them.
    fewest = sorted(lacking, key=len)[0]
    unknown = min(fewest)
    raise CheckpointError(
        f"{source.infos[f'{_PREFIX}{unknown}.lora_A.weight'].file}: adapts {unknown}, which is no map of the base as "
        f"{CAUSAL.name} or {INTERNVL_HF.name}"
    )


def _map_of(tensor: str, source: SafetensorsSource, *, has_norms: bool) -> str:
    endings = [".lora_A.weight", ".lora_B.weight"]
    if has_norms:
        endings.append(f".{_MAGNITUDE}")
    for ending in endings:
        if tensor.startswith(_PREFIX) and tensor.endswith(ending):
            name = tensor.removeprefix(_PREFIX).removesuffix(ending)
            if all(f"{_PREFIX}{name}.lora_{x}.weight" in source.infos for x in "AB"):
                return name
    raise CheckpointError(f"{source.infos[tensor].file}: {tensor} is no matrix of an adapter")


def _recipe_with(recipe: Recipe, config: dict[str, Any], pieces: list[str]) -> Recipe:
    lora = {
        "lora.rank": config["r"],
        "lora.alpha": float(config["lora_alpha"]),
        "lora.rslora": bool(config.get("use_rslora")),
        "lora.dora": bool(config.get("use_dora")),
        "lora.targets": pieces,
    }
    frozen = dict.fromkeys(
        [f"training.freeze_{part}" for part in ("vision_model", "projector", "language_model")],
        True,
    )
    try:
        return recipe.replaced(lora | frozen)
    except ConfigError as error:
        raise CheckpointError(f"adapters of {CONFIG}: {error}") from error
