"""Import rules: lower rooms never import higher ones."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EVERYWHERE = {"errors", "files", "registry", "rounding", "sizes", "supervise", "platform", "config"}
PURE = EVERYWHERE - {"supervise", "platform"} | {"media", "text", "layout", "costs"}
MAY_IMPORT = {
    "errors": set(),
    "files": set(),
    "registry": {"errors"},
    "rounding": set(),
    "sizes": set(),
    "supervise": {"errors"},
    "report": {"errors", "rounding", "config", "commands"},
    "commands": {"errors"},
    "launch": {"supervise"},
    "platform": {"errors"},
    "config": {"errors", "registry", "rounding"},
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
FILES = sorted((ROOT / "megatron_vita").rglob("*.py"))


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
