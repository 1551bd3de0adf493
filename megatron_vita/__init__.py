"""megatron_vita: training and serving of vision-language models with contexts of up to a million
tokens.

The names below are imported at their first use, since most need torch (docs/api.md).
"""

from typing import TYPE_CHECKING

from megatron_vita.lazy import imported_lazily

if TYPE_CHECKING:
    from megatron_vita.api import Model, from_hf, load, open_packs, to_hf
    from megatron_vita.config import Recipe, load_recipe
    from megatron_vita.errors import VitaError
    from megatron_vita.inference.prompt import MediaFile, Prompt
    from megatron_vita.inference.requests import SamplingParams
    from megatron_vita.registry import register
    from megatron_vita.training.callbacks import Callback
    from megatron_vita.training.loop import train

__version__ = "0.1.0"
__all__ = [
    "Callback",
    "MediaFile",
    "Model",
    "Prompt",
    "Recipe",
    "SamplingParams",
    "VitaError",
    "from_hf",
    "load",
    "load_recipe",
    "open_packs",
    "register",
    "to_hf",
    "train",
]
_PLACES = {
    "Callback": "training.callbacks",
    "MediaFile": "inference.prompt",
    "Model": "api",
    "Prompt": "inference.prompt",
    "Recipe": "config",
    "SamplingParams": "inference.requests",
    "VitaError": "errors",
    "from_hf": "api",
    "load": "api",
    "load_recipe": "config",
    "open_packs": "api",
    "register": "registry",
    "to_hf": "api",
    "train": "training.loop",
}


__getattr__ = imported_lazily(__name__, _PLACES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
