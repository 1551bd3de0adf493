"""A JSON array of records is read object by object."""

import json
import resource
from pathlib import Path

import pytest

from data_tools.formats import objects
from megatron_vita.errors import DataError
from tests.data_tools.imports import convert, human


def test_a_broken_array_gives_what_stands_before_the_break(tmp_path: Path) -> None:
    text = json.dumps([{"conversations": human(f"{i}?")} for i in range(100)])
    (tmp_path / "set.json").write_text(text[:-3000])
    samples, (entry,) = convert("llava", tmp_path / "set.json")
    assert 0 < len(samples) < 100
    assert entry["place"] == "the rest"
    assert f"malformed after object {len(samples)}: the file ends within it" in entry["reason"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 18])
def test_arrays_are_split_where_their_items_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(objects, "CHUNK", chunk)
    items = [{"a": ']}\\"'}, {"b": [{"c": ","}, []]}, {"d": "\\\\"}, {"é": "😀"}, {}]
    for indent, ascii_only in ((None, True), (2, False)):
        text = json.dumps(items, indent=indent, ensure_ascii=ascii_only) + "\n"
        (tmp_path / "set.json").write_bytes(b"\xef\xbb\xbf \n" + text.encode())
        found = [
            candidate.make() for candidate in objects.read_objects(tmp_path / "set.json", dict)
        ]
        assert found == items


@pytest.mark.parametrize(
    ("text", "samples", "reason"),
    [
        ('[{"a": }, {"b": 1}]', 1, "not JSON"),
        ("[3, {}]", 1, "a int, not a JSON object"),
        ("[{},]", 1, ""),
        ("[{}] x", 1, "b'x' follows its end"),
        ('[{"a": "\xff"}, {}]', 1, "not JSON"),
        ("[]", 0, ""),
    ],
)
def test_what_is_no_object_is_one_bad_sample(
    tmp_path: Path, text: str, samples: int, reason: str
) -> None:
    (tmp_path / "set.json").write_bytes(text.encode("latin-1"))
    found = 0
    reasons = ""
    try:
        for candidate in objects.read_objects(tmp_path / "set.json", dict):
            try:
                candidate.make()
                found += 1
            except DataError as error:
                reasons += str(error)
    except DataError as error:
        reasons += str(error)
    assert found == samples
    assert reason in reasons


def test_a_long_array_needs_no_memory_for_all_of_it(tmp_path: Path) -> None:
    with open(tmp_path / "set.json", "w") as file:
        file.write(
            "[" + ",".join(json.dumps({"n": i, "pad": "x" * 10000}) for i in range(10000)) + "]"
        )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in objects.read_objects(tmp_path / "set.json", dict)) == 10000
    # kilobytes, of 100 MB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
