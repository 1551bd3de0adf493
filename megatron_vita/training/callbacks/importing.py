"""Import of callbacks named by a recipe."""

import difflib
import importlib
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from megatron_vita.config import CallbackConfig
from megatron_vita.errors import ConfigError
from megatron_vita.training.run.callback import Callback


def import_callbacks(configs: Sequence[CallbackConfig]) -> list[Callback]:
    """Create an instance of each callback of `training.callbacks`.

    Raises:
        ConfigError: a module, class or argument does not exist; names the entry.
    """
    return [_import_callback(config) for config in configs]


def _import_callback(config: CallbackConfig) -> Callback:
    place = f"training.callbacks: {config.path}"
    module_name, _, name = config.path.rpartition(".")
    module = _import_module(module_name, place)
    kind = getattr(module, name, None)
    if kind is None:
        near = difflib.get_close_matches(name, dir(module), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{place}: {module.__file__ or module_name} has no {name}{hint}")
    if not (isinstance(kind, type) and issubclass(kind, Callback)):
        raise ConfigError(
            f"{place}: not a class derived from megatron_vita.training.callbacks.Callback"
        )
    try:
        inspect.signature(kind).bind(**config.arguments)
    except TypeError as error:
        raise ConfigError(f"{place}: arguments {config.arguments}: {error}") from error
    try:
        return kind(**config.arguments)
    except Exception as error:
        raise ConfigError(f"{place}: {type(error).__name__}: {error}") from error


def _import_module(name: str, place: str) -> ModuleType:
    """Import a module that is installed, or lies in the working folder."""
    # An installed command does not have the working folder on its path, as `python -m` has.
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not error.name or not f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(f"{place}: its module needs {error.name}: {error}") from error
        raise ConfigError(
            f"{place}: no module {error.name}: neither installed nor in the working folder {folder}"
        ) from error
