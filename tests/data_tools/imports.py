"""Sources for tests of `import`, and what it makes of them."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from data_tools.cli import main


def picture(color: str = "red", format: str = "PNG") -> bytes:
    """An image file of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(buffer, format)
    return buffer.getvalue()


def convert(
    format: str, source: Path, *options: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The samples and the rejections that `import` makes of a source."""
    root = source.parent
    out = root / "out.jsonl"
    code = main(["import", format, str(source), "--out", str(out), "--workers", "1", *options])
    samples = read(out)
    rejected = read(root / "out.rejected.jsonl")
    assert code == (1 if rejected and not samples else 0)
    return samples, rejected


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def human(text: str, *, answer: str = "Yes.") -> list[dict[str, str]]:
    return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]


def said(text: str, *, answer: str = "Yes.") -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
