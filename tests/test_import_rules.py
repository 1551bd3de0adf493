"""Import rules: lower rooms never import higher ones."""

import ast
import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EVERYWHERE = {
    "errors",
    "files",
    "registry",
    "rounding",
    "sizes",
    "stores",
    "supervise",
    "platform",
    "config",
}
PURE = EVERYWHERE - {"supervise", "platform"} | {"media", "text", "layout", "costs"}
MAY_IMPORT = {
    "errors": set(),
    "files": set(),
    "registry": {"errors"},
    "rounding": set(),
    "sizes": set(),
    "stores": set(),
    "supervise": {"errors"},
    "report": {"errors", "rounding", "config", "commands"},
    "commands": {"errors"},
    "launch": {"supervise"},
    "platform": {"errors"},
    "config": {"errors", "registry", "rounding", "sizes"},
    "media": EVERYWHERE,
    "text": EVERYWHERE,
    "layout": EVERYWHERE,
    "costs": EVERYWHERE,
    "data": EVERYWHERE | {"media", "text", "layout", "costs"},
    "parallel": EVERYWHERE | {"layout"},
    "model": EVERYWHERE | {"parallel", "layout"},
    "checkpoint": EVERYWHERE | {"model", "parallel"},
    "training": EVERYWHERE
    | {"media", "text", "layout", "costs", "data", "parallel", "model", "checkpoint"},
    "inference": EVERYWHERE
    | {
        "commands",
        "media",
        "text",
        "layout",
        "costs",
        "data",
        "parallel",
        "model",
        "checkpoint",
    },
    "convert": EVERYWHERE
    | {
        "commands",
        "media",
        "text",
        "layout",
        "costs",
        "data",
        "parallel",
        "model",
        "checkpoint",
    },
    "evaluation": EVERYWHERE | {"commands", "checkpoint", "media", "text", "data", "inference"},
}
MAY_IMPORT["api"] = set(MAY_IMPORT)
MAY_IMPORT["cli"] = set(MAY_IMPORT)
MAY_IMPORT["__main__"] = {"cli"}
SUB_PACKAGES = {
    "config": ("parsing", "groups"),
    "convert": ("exported", "families", "formats", "settings"),
    "costs": ("memory",),
    "data": ("samples", "shards", "planning", "loading"),
    "data_tools": ("reading", "workers", "formats", "viewing"),
    "evaluation": ("adapters",),
    "inference": ("requests", "runner", "generation", "client", "vision", "engine", "server"),
    "model": ("backends", "output"),
    "training": ("optimizer", "metrics", "run", "step", "callbacks"),
}
"""Sub-packages of each room; each may import those before it."""
MOST_FLAT = 18
"""Modules that a folder holds at most, so that it is seen at a glance."""
FILES = sorted((ROOT / "megatron_vita").rglob("*.py"))


@functools.cache
def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, at the top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "megatron_vita").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_room_imports_a_higher_one(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("megatron_vita.")}
    assert rooms <= MAY_IMPORT[room] | {room}, (
        f"{room} may not import {rooms - MAY_IMPORT[room] - {room}}"
    )


@pytest.mark.parametrize(
    "path", [p for p in FILES if room_of(p) in PURE], ids=lambda p: str(p.relative_to(ROOT))
)
def test_pure_rooms_import_neither_megatron_core_nor_torch_distributed(path: Path) -> None:
    found = {name for name in imports(path) if name.startswith(("megatron.", "torch.distributed"))}
    assert not found


@pytest.mark.parametrize("room", sorted({room_of(p) for p in FILES} - {"__init__"}))
def test_rooms_that_import_megatron_core_open_the_door_first(room: str) -> None:
    files = [p for p in FILES if room_of(p) == room]
    uses = any(name.startswith("megatron.") for p in files for name in imports(p))
    folder = ROOT / "megatron_vita" / room
    front = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    opens = "megatron_vita.platform" in imports(front)
    assert opens or not uses or room == "platform"


def module_of(path: Path) -> str:
    """Dotted name from the room on: data.shards.tar; of a room's `__init__`, data."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[parts[0] == "megatron_vita" :]
    return ".".join(parts).removesuffix(".__init__")


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those for type checkers alone, which are never run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from statements(node)


MODULES = {module_of(path): path for path in (*FILES, *sorted((ROOT / "data_tools").rglob("*.py")))}


def imported_modules(path: Path) -> set[str]:
    """Modules of ours that a file imports when it runs, at the top or inside functions."""
    found = set()
    for node in statements(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            name = name.removeprefix("megatron_vita.")
            while name and name not in MODULES:
                name = name.rpartition(".")[0]  # a class or function of the module
            found.add(name)
    return found - {"", module_of(path)}


IMPORTED = {module: imported_modules(path) for module, path in MODULES.items()}


def unit_of(module: str) -> str:
    """Room and sub-package or file: data.shards, data.batch."""
    return ".".join(module.split(".")[:2])


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Nodes of a graph that remain once those that lead nowhere are removed, again and again."""
    left = {node: set(following) for node, following in graph.items()}
    while ends := [node for node, following in left.items() if not following & left.keys()]:
        for node in ends:
            del left[node]
    return [f"{node} -> {', '.join(sorted(left[node] & left.keys()))}" for node in sorted(left)]


def test_no_file_imports_itself_through_others() -> None:
    assert not cycle(IMPORTED)


@pytest.mark.parametrize("room", sorted({module.split(".")[0] for module in MODULES}))
def test_no_sub_package_imports_itself_through_others_of_its_room(room: str) -> None:
    graph: dict[str, set[str]] = {}
    for module, imported in IMPORTED.items():
        if module.startswith(f"{room}."):
            unit = unit_of(module)
            inside = {unit_of(name) for name in imported if name.startswith(f"{room}.")}
            graph.setdefault(unit, set()).update(inside - {unit})
    assert not cycle(graph)


def folder_of(module: str) -> str:
    """Folder of a module; a module beside the rooms is one itself."""
    path = MODULES[module]
    return module if path.name == "__init__.py" else module.rpartition(".")[0] or module


def test_no_folder_imports_itself_through_others() -> None:
    graph: dict[str, set[str]] = {}
    for module, imported in IMPORTED.items():
        folder = folder_of(module)
        graph.setdefault(folder, set()).update({folder_of(name) for name in imported} - {folder})
    assert not cycle(graph)


def test_no_folder_is_too_full_to_be_seen_at_a_glance() -> None:
    counts = Counter(path.parent.relative_to(ROOT) for path in MODULES.values())
    full = {str(folder): count - 1 for folder, count in counts.items() if count - 1 > MOST_FLAT}
    assert not full, f"more than {MOST_FLAT} modules beside __init__.py"


def test_no_sub_package_imports_a_later_one_of_its_room() -> None:
    wrong = []
    for module, imported in IMPORTED.items():
        room, *inner = module.split(".")
        order = SUB_PACKAGES.get(room, ())
        if not inner or inner[0] not in order:
            continue
        later = order[order.index(inner[0]) + 1 :]
        names = [name for name in imported if name.startswith(tuple(f"{room}.{n}" for n in later))]
        wrong += [f"{module} imports {name}" for name in names]
    assert not wrong


def test_every_sub_package_has_a_place_in_the_order() -> None:
    folders = {tuple(module.split(".")[:2]) for module in MODULES if module.count(".") > 1}
    assert folders == {(room, name) for room, names in SUB_PACKAGES.items() for name in names}
