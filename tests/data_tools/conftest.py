"""Worker processes that have imported what most of them need, and a folder of media."""

from pathlib import Path

import pytest

from data_tools.workers import pool
from tests.data_tools.foreign_layouts import FILES
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


@pytest.fixture(scope="module")
def foreign_media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the media that records of foreign layouts name."""
    folder = tmp_path_factory.mktemp("media")
    for name, data in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder
