"""Worker processes that have imported what most of them need, and a folder of media."""

from pathlib import Path

import pytest

from data_tools import pool
from tests.data_tools.imports import picture

# It imports torch, which each worker that writes a shard would do by itself.
pool.PRELOADED.append("webdataset")


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(picture())
    (folder / "film.mp4").write_bytes(b"some film")
    return folder
