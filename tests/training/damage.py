"""Ways to damage the checkpoint of a toy run's step 8: the file, and what is done to it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

TENSORS = "__0_0.distcp"


def flip(path: Path, place: float) -> None:
    """Change one byte at a share of a file's length."""
    data = bytearray(path.read_bytes())
    data[min(int(len(data) * place), len(data) - 1)] ^= 1
    path.write_bytes(data)


def cut(path: Path, count: int) -> None:
    """Cut off the last bytes of a file."""
    path.write_bytes(path.read_bytes()[:-count])


def edit(path: Path, old: str, new: str) -> None:
    """Replace a text that a file has."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def put_zeros(path: Path) -> None:
    """Overwrite a page with zeros, as file systems do after a power failure."""
    data = bytearray(path.read_bytes())
    data[8192:12288] = bytes(4096)
    path.write_bytes(data)


def exchange_tensors(path: Path) -> None:
    """Exchange the bytes of two tensors of the same size: each is intact, in the other's place."""
    spans = json.loads((path.parent / "manifest.json").read_text())["files"][TENSORS]
    lengths = [length for _, length, _ in spans]
    data = bytearray(path.read_bytes())
    for first in range(len(spans)):
        for second in range(first + 1, len(spans)):
            a, b = (slice(spans[i][0], spans[i][0] + spans[i][1]) for i in (first, second))
            if lengths[first] == lengths[second] and data[a] != data[b]:
                data[a], data[b] = data[b], data[a]
                path.write_bytes(data)
                return
    raise AssertionError("no two tensors of one size")


def replace_by_folder(path: Path) -> None:
    """Put a folder in the place of a file."""
    path.unlink()
    path.mkdir()


def take_from_step_4(path: Path) -> None:
    """Replace a file by that of the checkpoint before, of the same size."""
    shutil.copyfile(path.parent.parent / "step_00000004" / path.name, path)


DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "tensors missing": (TENSORS, Path.unlink),
    "tensors cut": (TENSORS, lambda path: cut(path, 1)),
    "tensors cut in half": (TENSORS, lambda path: cut(path, path.stat().st_size // 2)),
    "tensors empty": (TENSORS, lambda path: path.write_bytes(b"")),
    "tensors lengthened": (TENSORS, lambda path: path.write_bytes(path.read_bytes() + b"\0")),
    "tensors a folder": (TENSORS, replace_by_folder),
    "first byte of tensors": (TENSORS, lambda path: flip(path, 0)),
    "byte inside of tensors": (TENSORS, lambda path: flip(path, 0.5)),
    "last byte of tensors": (TENSORS, lambda path: flip(path, 1)),
    "page of zeros in tensors": (TENSORS, put_zeros),
    "two tensors exchanged": (TENSORS, exchange_tensors),
    "tensors of another step": (TENSORS, take_from_step_4),
    "index missing": (".metadata", Path.unlink),
    "index cut": (".metadata", lambda path: cut(path, 5)),
    "byte of index": (".metadata", lambda path: flip(path, 0.3)),
    "format missing": ("metadata.json", Path.unlink),
    "format altered": ("metadata.json", lambda path: edit(path, "torch_dist", "torch_diss")),
    "tokenizer altered": ("tokenizer.model", lambda path: flip(path, 0.5)),
    "manifest missing": ("manifest.json", Path.unlink),
    "manifest cut": ("manifest.json", lambda path: cut(path, 20)),
    "manifest a list": ("manifest.json", lambda path: path.write_text("[]")),
    "position altered": (
        "manifest.json",
        lambda path: edit(path, '"consumed_packs": 32', '"consumed_packs": 28'),
    ),
    "checkpoint missing": ("", shutil.rmtree),
}
