"""Writes are atomic and durable; JSONL files survive a kill in the middle of a line."""

import fcntl
import json
import os
from pathlib import Path
from typing import IO

import pytest

from megatron_vita.files import (
    append_json_lines,
    atomic_write,
    complete_lines,
    cut_torn_line,
    publish,
    write_json_lines,
)


def entries_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in complete_lines(path)]


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


def write_half(path: Path, error: type[BaseException]) -> None:
    with atomic_write(path) as partial:
        partial.write_text("new")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(error):
        write_half(path, error)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_what_a_killed_writer_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.partial").write_text("a longer text of a killed writer")
    write_json_lines(tmp_path / "a", [{"n": 1}])
    assert entries_of(tmp_path / "a") == [{"n": 1}]
    assert os.listdir(tmp_path) == ["a"]


def test_content_is_synced_before_the_name_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    replace = os.replace

    def fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def renamed(source: Path, target: Path) -> None:
        events.append(f"{Path(source).name} -> {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    with atomic_write(tmp_path / "a") as partial:
        partial.write_text("new")
    publish(tmp_path / "a", tmp_path / "b")
    append_json_lines(tmp_path / "c", [{"n": 1}])
    folder = tmp_path.name
    assert events == ["a.partial", "a.partial -> a", folder, "a -> b", folder, "c"]


def test_a_torn_line_is_skipped_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_json_lines(path, [{"n": 1}, {"n": 2}])
    path.write_bytes(path.read_bytes() + b'{"n": ')
    assert entries_of(path) == [{"n": 1}, {"n": 2}]
    append_json_lines(path, [{"n": 3}])
    assert entries_of(path) == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_a_file_that_is_one_torn_line_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"n": ')
    assert complete_lines(path) == []
    append_json_lines(path, [{"n": 1}])
    assert entries_of(path) == [{"n": 1}]
    assert complete_lines(tmp_path / "missing.jsonl") == []


@pytest.mark.parametrize("text", ["a\u2028b", "a\u0085b", "a\x0bb", "a\rb\nc", "ä", "\ud800"])
def test_any_text_is_one_line(tmp_path: Path, text: str) -> None:
    """Only a line feed ends a line; other separators of Unicode stand in JSON text as they are."""
    ensure_ascii = text == "\ud800"  # which UTF-8 cannot encode
    append_json_lines(tmp_path / "lines.jsonl", [{"text": text}] * 2, ensure_ascii=ensure_ascii)
    assert entries_of(tmp_path / "lines.jsonl") == [{"text": text}] * 2


def test_a_file_of_a_killed_writer_is_removed_and_that_of_a_living_one_is_kept(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a"
    abandoned = tmp_path / "a.0123abcd.partial"
    abandoned.write_text("half")
    with atomic_write(path, concurrent=True) as living:
        living.write_text("slow")
        assert not abandoned.exists()
        with atomic_write(path, concurrent=True) as other:
            other.write_text("quick")
        assert path.read_text() == "quick"
    assert path.read_text() == "slow"
    assert os.listdir(tmp_path) == ["a"]


def test_a_writer_begins_anew_whose_file_was_removed_before_it_was_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock
    opened: list[str] = []

    def removed_once(file: IO[bytes], operation: int) -> None:
        if not opened:
            os.unlink(file.name)
        opened.append(file.name)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", removed_once)
    with atomic_write(tmp_path / "a", concurrent=True) as partial:
        partial.write_text("new")
    assert (tmp_path / "a").read_text() == "new"
    assert opened == [str(partial)] * 2


def test_a_temporary_file_that_was_made_anew_is_not_taken_for_the_abandoned_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock
    abandoned = tmp_path / "a.0123abcd.partial"
    abandoned.write_text("half")

    def made_anew(file: IO[bytes], operation: int) -> None:
        if Path(file.name) == abandoned and abandoned.read_text() == "half":
            abandoned.unlink()
            abandoned.write_text("of a living writer")
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", made_anew)
    with atomic_write(tmp_path / "a", concurrent=True) as partial:
        partial.write_text("new")
    assert abandoned.read_text() == "of a living writer"


@pytest.mark.parametrize(
    ("content", "left"),
    [
        (b"", b""),
        (b"torn", b""),
        (b"whole\n", b"whole\n"),
        (b"whole\ntorn", b"whole\n"),
        (b"whole\n" + b"x" * 200_000, b"whole\n"),
        (b"x" * 70_000 + b"\n" + b"y" * 65_535, b"x" * 70_000 + b"\n"),
    ],
)
def test_what_a_kill_has_left_of_a_line_is_cut_off(
    tmp_path: Path, content: bytes, left: bytes
) -> None:
    path = tmp_path / "rows.jsonl"
    cut_torn_line(path)
    path.write_bytes(content)
    cut_torn_line(path)
    assert path.read_bytes() == left
