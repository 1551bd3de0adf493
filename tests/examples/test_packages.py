"""Files out of packages."""

import zipfile
from pathlib import Path

import pytest

from examples.packages import download_wheel

METADATA = "Metadata-Version: 2.1\nName: two-words\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the package index, with one package."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "two_words-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("two_words/words.txt", "red blue")
        wheel.writestr("two_words-1.0.dist-info/METADATA", METADATA)
        wheel.writestr("two_words-1.0.dist-info/WHEEL", WHEEL)
        wheel.writestr("two_words-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.mark.parametrize("relative", [True, False])
def test_a_wheel_is_downloaded_into_a_folder_however_it_is_named(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/words") if relative else tmp_path / "runs/words"
    with zipfile.ZipFile(download_wheel("two-words==1.0", folder)) as wheel:
        assert wheel.read("two_words/words.txt") == b"red blue"
    assert len(list(tmp_path.rglob("*.whl"))) == 2
