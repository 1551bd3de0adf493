"""Names that recipes and commands know, and that other packages may add to.

    from megatron_vita import register

    @register("metric", "starts")
    def starts(answer: str, reference: str) -> bool: ...

An installed package is found by its entry points in the group `megatron_vita.plugins`. Each names a
module, which registers its entries when it is imported.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, Literal, get_args, overload

from megatron_vita.errors import ConfigError

Kind = Literal[
    "data_format", "folder_format", "language_family", "metric", "schedule", "vision_tower"
]
PLUGINS = "megatron_vita.plugins"
"""Group of entry points."""

_added: dict[str, dict[str, Any]] = {kind: {} for kind in get_args(Kind)}
_loaded = False


class Registry[Entry](Mapping[str, Entry]):
    """Entries of one kind by name: the package's own, and those that were registered.

    The first look loads the plugins of installed packages.
    """

    def __init__(self, kind: Kind, own: Mapping[str, Entry]) -> None:
        self.kind = kind
        self._own = dict(own)

    def __getitem__(self, name: str) -> Entry:
        return self._entries()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries())

    def __len__(self) -> int:
        return len(self._entries())

    def _entries(self) -> dict[str, Entry]:
        load_plugins()
        added = _added[self.kind]
        if taken := sorted(self._own.keys() & added.keys()):
            raise ConfigError(
                f"{self.kind} {taken[0]!r} is the package's own: register yours by another name"
            )
        return self._own | added


@overload
def register[Entry](kind: Kind, name: str) -> Callable[[Entry], Entry]: ...
@overload
def register[Entry](kind: Kind, name: str, entry: Entry) -> Entry: ...


def register(kind: Kind, name: str, entry: Any = None) -> Any:
    """Add `entry` by name, or what is defined below where it stands as a decorator.

    The same name again replaces what was registered before, so that a cell of a notebook can run
    twice.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind not in _added:
        raise ConfigError(f"kind is {kind!r}; known: {', '.join(_added)}")
    if entry is None:
        return lambda defined: register(kind, name, defined)
    _added[kind][name] = entry
    return entry


def load_plugins() -> None:
    """Import the modules that installed packages name, once in a process.

    Raises:
        ConfigError: one of them cannot be imported.
    """
    global _loaded
    if _loaded:
        return
    _loaded = True  # at once: a plugin may look up names while it is imported
    for point in sorted(entry_points(group=PLUGINS)):
        try:
            point.load()
        except Exception as error:
            _loaded = False
            raise ConfigError(
                f"plugin {point.name} ({point.value}) cannot be imported: "
                f"{type(error).__name__}: {error}"
            ) from error
