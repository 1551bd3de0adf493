"""A class name stands for one thing in the whole tree."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
SAME = {
    # The engine's types, and the server's protocols of what it uses of them.
    "PreparedPrompt": 2,
    "Usage": 2,
    "VideoFrames": 2,
    # The text among the parts of a message: of a conversation, and of a request's body.
    "TextPart": 2,
}
"""Names of several classes for one thing, seen from two sides."""


def class_names() -> dict[str, list[str]]:
    """Places of the package's and the tools' classes by name."""
    places: dict[str, list[str]] = defaultdict(list)
    for room in ("megatron_vita", "data_tools"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return places


def test_no_class_name_is_used_twice_for_different_things() -> None:
    several = {name: found for name, found in class_names().items() if len(found) > 1}
    wrong = {name: found for name, found in several.items() if len(found) != SAME.get(name)}
    assert not wrong
    assert several.keys() == SAME.keys(), "a name of SAME is used once now"
