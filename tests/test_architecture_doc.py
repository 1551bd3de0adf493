"""The architecture page names files and types that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STEP = re.compile(r"^(\d+)\. `([\w/]+\.py)`: (.*)$", re.MULTILINE)


def section(title: str) -> str:
    """The text of a section of the page."""
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def classes_of_package() -> dict[str, set[str]]:
    """Names of top-level classes by file of the package."""
    found = {}
    for path in (ROOT / "megatron_vita").rglob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        names = {node.name for node in body if isinstance(node, ast.ClassDef)}
        found[path.relative_to(ROOT / "megatron_vita").as_posix()] = names
    return found


def test_each_step_of_the_two_lives_names_a_file_with_its_first_type() -> None:
    classes = classes_of_package()
    steps = STEP.findall(section("Two lives"))
    assert len(steps) == 24, "two lives of 12 steps"
    everything = set().union(*classes.values())
    for number, file, text in steps:
        types = re.findall(r"`([A-Z]\w+)`", text)
        assert types, f"step {number} of {file} names no type"
        assert types[0] in classes.get(file, set()), f"{file} does not define {types[0]}"
        assert set(types) <= everything, f"{file}: {set(types) - everything} are no classes"


def test_files_in_the_architecture_page_exist() -> None:
    names = set(re.findall(r"`((?:[\w]+/)*[\w]+\.py)`", PAGE))
    known = [path.name for path in ROOT.glob("*.py")]
    for folder in ("megatron_vita", "data_tools", "examples", "tests"):
        known += [path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")]
    missing = [name for name in names if not any(f"/{path}".endswith(f"/{name}") for path in known)]
    assert not missing


def names_of(path: Path) -> set[str]:
    """Names that a module defines or assigns at its top level."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_each_line_of_where_to_look_begins_at_something_that_its_file_defines() -> None:
    lines = re.findall(
        r"^\| [^|]+ \| `([\w/]+\.py)`: `(\w+)`", section("Where to look"), re.MULTILINE
    )
    assert len(lines) == section("Where to look").count("\n| ") - 1, "a line names no place"
    for file, name in lines:
        places = [ROOT / room / file for room in ("megatron_vita", "data_tools")]
        (path,) = [path for path in places if path.is_file()]
        assert name in names_of(path), f"{file} does not define {name}"
