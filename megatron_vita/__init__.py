"""megatron_vita: training and serving of vision-language models with contexts of up to a million
tokens.

The names below are imported at their first use, since most need torch (docs/api.md).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_vita.api import Model, from_hf, load, open_packs, to_hf
    from megatron_vita.config import Recipe, load_recipe
    from megatron_vita.errors import VitaError
    from megatron_vita.inference.requests.prompt import MediaFile, Prompt
    from megatron_vita.inference.requests.types import SamplingParams
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
    "MediaFile": "inference.requests.prompt",
    "Model": "api",
    "Prompt": "inference.requests.prompt",
    "Recipe": "config",
    "SamplingParams": "inference.requests.types",
    "VitaError": "errors",
    "from_hf": "api",
    "load": "api",
    "load_recipe": "config",
    "open_packs": "api",
    "register": "registry",
    "to_hf": "api",
    "train": "training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
