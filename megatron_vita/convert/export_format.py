"""Which layout a checkpoint goes out in, and what its config says."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_vita.config import ModelConfig
from megatron_vita.convert.config_file import CONFIG, Config
from megatron_vita.convert.families.layouts import (
    ALL_PARTS,
    CAUSAL,
    EVA,
    INTERNVL_HF,
    LONG_VITA,
    PREFIXED,
    Layout,
    layout_named,
    layout_of,
)
from megatron_vita.convert.sidecar_files import FOLDER
from megatron_vita.convert.transfers import Transfer
from megatron_vita.errors import CheckpointError


def kept_folders(checkpoint: Path, *, tokenizer: str) -> list[Path]:
    """Folders of companions, each named by its layout: those that a checkpoint brought along, else
    those of the converted checkpoint in which the tokenizer of its run lies."""
    own = sorted(folder for folder in (checkpoint / FOLDER).glob("*") if folder.is_dir())
    origin = Path(tokenizer).parent
    if own or origin.name != FOLDER:
        return own
    return sorted(folder for folder in origin.glob("*") if folder.is_dir())


def choose_layout(
    kept: list[Path], model: ModelConfig, *, layout: str, like: Path | None
) -> tuple[Layout, Path | None]:
    """The named layout, that of `like`, that of the only one of `kept` folders, or that of the
    model's parts; and the folder whose config and companions are taken over, if there is one.

    CheckpointError for one that does not fit the model.
    """
    if like is not None:
        found = layout_of(Config.read(like))
        chosen = layout_named(layout) if layout else found
        if chosen.name.removesuffix(PREFIXED) != found.name:
            raise CheckpointError(f"{like}: is of layout {found.name}, not {layout}")
    elif layout:
        chosen = layout_named(layout)
    elif len(kept) == 1 and _fits(layout_named(kept[0].name), model):
        chosen = layout_named(kept[0].name)
    else:
        whole = LONG_VITA if model.projector.kind == LONG_VITA.projector else INTERNVL_HF
        chosen = CAUSAL if model.text_only else whole
    _check_parts(chosen, model)
    origins = (f for f in kept if f.name == chosen.name and (f / CONFIG).exists())
    return chosen, like or next(origins, None)


def _fits(layout: Layout, model: ModelConfig) -> bool:
    """Whether a layout has a place for all parts of the model."""
    return layout.parts == (CAUSAL.parts if model.text_only else ALL_PARTS)


def _check_parts(layout: Layout, model: ModelConfig) -> None:
    if model.text_only and layout.parts != CAUSAL.parts:
        raise CheckpointError(
            f"layout {layout.name} has a vision tower, but model.text_only is true: use {CAUSAL.name}"
        )
    if layout.parts == ALL_PARTS and model.projector.kind != layout.projector:
        raise CheckpointError(
            f"layout {layout.name} has a projector of kind {layout.projector}; "
            f"model.projector.kind is {model.projector.kind}"
        )


def config_fields(
    layout: Layout, model: ModelConfig, *, base: dict[str, Any], transfers: list[Transfer]
) -> dict[str, Any]:
    """The config of a folder: `base` itself if it says what the model is, else one that does.

    CheckpointError, naming the field, if the layout has no way to say it.
    """
    names = {name for transfer in transfers for name in transfer.rule.theirs}

    def differing(fields: dict[str, Any]) -> str | None:
        return _difference(layout, layout.read(Config(fields, CONFIG), names), model)

    part_of_more = (
        "vision_config" in base and layout.parts == ("vision_model",) and layout is not EVA
    )
    if base and not part_of_more and differing(base) is None:
        return base
    fields = layout.write(model, base)
    if (field := differing(fields)) is not None:
        raise CheckpointError(
            f"layout {layout.name} is of other models: it cannot say {field}; use another layout"
        )
    fields["dtype"] = str(transfers[0].dtype).removeprefix("torch.")
    fields.pop("torch_dtype", None)
    return fields


def _difference(layout: Layout, one: ModelConfig, other: ModelConfig) -> str | None:
    """The first field in which two models differ, in the parts of a layout; first weights do not
    count."""
    for part in (part.removesuffix("_model") for part in layout.parts):
        mine = asdict(getattr(other, part))
        for name, value in asdict(getattr(one, part)).items():
            if value != mine[name] and not name.endswith(("init", "init_method_std")):
                return f"model.{part}.{name} {mine[name]}"
    return None
