"""Compressed files of samples are refused by name, in folders and as they are named."""

import gzip
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_tools.cli import app
from data_tools.formats.base import find_files
from megatron_vita.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "suffixes"),
    [
        ("x.jsonl.gz", (".json", ".jsonl")),
        ("X.JSON.ZST", (".json", ".jsonl")),
        ("x.parquet.xz", (".parquet",)),
        ("x.tar.gz", (".tar",)),
        ("x.tgz", (".tar",)),
    ],
)
def test_a_compressed_file_in_a_folder_is_named(
    name: str, suffixes: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / f"good{suffixes[0]}").touch()
    (tmp_path / "notes.gz").touch()  # of nobody knows what
    assert find_files([tmp_path], *suffixes) == [tmp_path / f"good{suffixes[0]}"]
    file = tmp_path / "sub" / name
    file.touch()
    for given in (tmp_path, file):
        with pytest.raises(ConfigError, match=f"{file}: is compressed .* unpack it first"):
            find_files([given], *suffixes)


@pytest.mark.parametrize("command", ["shard", "tokenizer"])
def test_a_compressed_file_that_is_named_is_no_file_of_wrong_lines(
    command: str, tmp_path: Path
) -> None:
    file = tmp_path / "x.jsonl.gz"
    file.write_bytes(gzip.compress(b"{}\n"))
    out = tmp_path / ("out" if command == "shard" else "x.model")
    workers = ["--workers", "0"] if command == "shard" else []
    result = CliRunner().invoke(app, [command, str(file), "--out", str(out), *workers])
    assert isinstance(result.exception, ConfigError)
    assert f"{file}: is compressed (.gz)" in str(result.exception)
