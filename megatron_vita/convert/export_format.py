"""Choice of the folder format of an export, and the fields of its config.json."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_vita.config import ModelConfig
from megatron_vita.convert.families.config_file import CONFIG, Config
from megatron_vita.convert.families.folder_formats import (
    ALL_PARTS,
    CAUSAL,
    EVA,
    INTERNVL_HF,
    LONG_VITA,
    PREFIXED,
    FolderFormat,
    format_named,
    format_of,
)
from megatron_vita.convert.settings.sidecar_files import FOLDER
from megatron_vita.convert.transfers import Transfer
from megatron_vita.errors import CheckpointError


def kept_folders(checkpoint: Path, *, tokenizer: str) -> list[Path]:
    """Folders of sidecar files, each named after its format: those inside the checkpoint, or else
    those of the converted checkpoint that holds the tokenizer of the run."""
    own = sorted(folder for folder in (checkpoint / FOLDER).glob("*") if folder.is_dir())
    origin = Path(tokenizer).parent
    # A training run copies no sidecar files into its checkpoints, but its tokenizer's path leads to
    # those of the checkpoint that it started from.
    if own or origin.name != FOLDER:
        return own
    return sorted(folder for folder in origin.glob("*") if folder.is_dir())


def choose_format(
    kept: list[Path], model: ModelConfig, *, folder_format: str, like: Path | None
) -> tuple[FolderFormat, Path | None]:
    """Choose the format to write, and the folder whose config and sidecar files are reused, if any.

    The format is the named one, or that of the folder `like`, or that of the only folder in `kept`,
    or the default for the model's parts, in this order.

    Raises:
        CheckpointError: the format does not fit the model.
    """
    if like is not None:
        found = format_of(Config.read(like))
        chosen = format_named(folder_format) if folder_format else found
        # A config does not show whether tensor names have the prefix, so `like` fits both variants.
        if chosen.name.removesuffix(PREFIXED) != found.name:
            raise CheckpointError(f"{like}: is of format {found.name}, not {folder_format}")
    elif folder_format:
        chosen = format_named(folder_format)
    elif len(kept) == 1 and _fits(format_named(kept[0].name), model):
        chosen = format_named(kept[0].name)
    else:
        chosen = _default_format(model)
    _check_parts(chosen, model)
    # A folder without config.json has a tokenizer only (`import_megatron`): there is nothing to
    # reuse.
    origins = (f for f in kept if f.name == chosen.name and (f / CONFIG).exists())
    return chosen, like or next(origins, None)


def _default_format(model: ModelConfig) -> FolderFormat:
    if model.text_only:
        return CAUSAL
    if model.projector.kind == LONG_VITA.projector:
        return LONG_VITA
    return INTERNVL_HF


def prospect(model: ModelConfig) -> str:
    """Say of a model from parts which format its exports will have, and who loads that."""
    chosen = _default_format(model)
    if (reason := _misfit(chosen, model)) is not None:
        return f"no format holds all of the model ({reason}): its parts are exported alone, by --format"
    if chosen is LONG_VITA:
        return (
            f"exports have format {LONG_VITA.name}, which transformers opens with the modelling "
            "files in them (trust_remote_code=True); "
            f"--projector {INTERNVL_HF.projector} makes a model that it opens by itself"
        )
    return f"exports have format {chosen.name}, which transformers opens by itself"


def _misfit(folder_format: FolderFormat, model: ModelConfig) -> str | None:
    """Describe what a new folder of a format cannot hold of a model; None if it holds all."""
    names = {name for rule in folder_format.table(model) for name in rule.theirs}
    try:
        said = folder_format.read(Config(folder_format.write(model, {}), CONFIG), names)
    except CheckpointError as error:
        return str(error)
    field = _difference(folder_format, said, model)
    return None if field is None else f"format {folder_format.name} cannot say {field}"


def _fits(folder_format: FolderFormat, model: ModelConfig) -> bool:
    """Tell whether a format holds exactly the parts of the model."""
    return folder_format.parts == (CAUSAL.parts if model.text_only else ALL_PARTS)


def _check_parts(folder_format: FolderFormat, model: ModelConfig) -> None:
    if model.text_only and folder_format.parts != CAUSAL.parts:
        raise CheckpointError(
            f"format {folder_format.name} has a vision tower, but model.text_only is true: use {CAUSAL.name}"
        )
    if folder_format.parts == ALL_PARTS and model.projector.kind != folder_format.projector:
        raise CheckpointError(
            f"format {folder_format.name} has a projector of kind {folder_format.projector}; "
            f"model.projector.kind is {model.projector.kind}"
        )


def config_fields(
    folder_format: FolderFormat,
    model: ModelConfig,
    *,
    base: dict[str, Any],
    transfers: list[Transfer],
) -> dict[str, Any]:
    """Fields of config.json: `base` unchanged if it describes the model, otherwise an updated one.

    Raises:
        CheckpointError: the format cannot express the model; the message names the field.
    """
    # The reader asks which tensors exist, for instance to tell whether the embeddings are tied.
    names = {name for transfer in transfers for name in transfer.rule.theirs}

    def differing(fields: dict[str, Any]) -> str | None:
        return _difference(folder_format, folder_format.read(Config(fields, CONFIG), names), model)

    # A tower exported alone gets its own config, although that of the whole model describes it too.
    # GLM-4V's is the only config that EVA has.
    part_of_more = (
        "vision_config" in base
        and folder_format.parts == ("vision_model",)
        and folder_format is not EVA
    )
    if base and not part_of_more and differing(base) is None:
        return base
    fields = folder_format.write(model, base)
    if (field := differing(fields)) is not None:
        raise CheckpointError(
            f"format {folder_format.name} is of other models: it cannot say {field}; use another format"
        )
    # transformers 4 wrote torch_dtype; left in place, the two fields could contradict each other.
    fields["dtype"] = str(transfers[0].dtype).removeprefix("torch.")
    fields.pop("torch_dtype", None)
    return fields


def _difference(folder_format: FolderFormat, one: ModelConfig, other: ModelConfig) -> str | None:
    """First field in which two models differ, among the parts of a format. Initialization is not
    compared."""
    for part in (part.removesuffix("_model") for part in folder_format.parts):
        mine = asdict(getattr(other, part))
        for name, value in asdict(getattr(one, part)).items():
            # A published config says nothing of our initialization.
            if value != mine[name] and not name.endswith(("init", "init_method_std")):
                return f"model.{part}.{name} {mine[name]}"
    return None
