"""Each layout of the sets that docs/weights-and-data.md names is imported whole."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.formats.base import Setting
from data_tools.importing import ImportJob, import_samples
from data_tools.workers.pool import WorkerOptions
from megatron_vita.data.samples.foreign import DEFAULT_PROMPT, sample_of
from megatron_vita.errors import DataError
from megatron_vita.text.conversation import TextPart, check_messages
from tests.data_tools.published_sets import ASKED, LAYOUTS, SAID

PAGE = Path(__file__).parents[2] / "docs" / "weights-and-data.md"


def imported(name: str, folder: Path, foreign_media: Path) -> list[dict[str, Any]]:
    """Samples that `vita data import` writes of a layout's record."""
    layout = LAYOUTS[name]
    source = folder / ("set.parquet" if layout.form == "hf" else "set.jsonl")
    if layout.form == "hf":
        pq.write_table(pa.Table.from_pylist([layout.record]), source)
    else:
        source.write_text(json.dumps(layout.record) + "\n")
    out = folder / "out.jsonl"
    setting = Setting(media=foreign_media, media_out=folder / "found", prompt=DEFAULT_PROMPT)
    job = ImportJob(format=layout.form, paths=[source], out=out, setting=setting)
    counts = import_samples(job, options=WorkerOptions(workers=0))
    assert counts["rejected"] == 0, out.with_suffix(".rejected.jsonl").read_text()
    return [json.loads(line) for line in out.read_text().splitlines()]


def turns_of(sample: dict[str, Any]) -> list[tuple[str, str]]:
    """Role and text of each turn; a raw text's role is `text`."""
    if "messages" not in sample:
        return [("text", sample["text"])]
    return [
        (turn.role, "".join(p.text for p in turn.parts if isinstance(p, TextPart)).strip())
        for turn in check_messages(sample)
    ]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_record_of_each_published_layout_is_imported_whole(
    name: str, tmp_path: Path, foreign_media: Path
) -> None:
    layout = LAYOUTS[name]
    (sample,) = imported(name, tmp_path, foreign_media)
    assert turns_of(sample) == layout.turns
    assert len(sample.get("images", [])) == layout.images
    assert len(sample.get("videos", [])) == layout.videos


def test_the_page_names_a_layout_for_every_set_and_every_layout_is_of_a_set() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| `(\w+)` \| (.+) \|$", page, re.MULTILINE)
    assert {name: form for name, form, _ in rows} == {
        name: layout.form for name, layout in LAYOUTS.items()
    }
    sets = " ".join(sets for _, _, sets in rows)
    before = page.partition("## Layouts")[0].partition("| group |")[2]
    for name in re.findall(r"`([\w.-]+/[\w.-]+)`", before):
        assert f"`{name}`" in sets, name


@pytest.mark.parametrize("field", ["texts", "messages", "chatml"])
def test_a_list_of_texts_is_a_conversation_by_its_name_alone(field: str) -> None:
    captions = ["A cat.", "A feline on a mat."]
    for value in (captions, json.dumps(captions)):
        with pytest.raises(DataError, match=f"{field} is a list of texts, 'A cat.' the first"):
            sample_of({field: value, "image": "a.jpg"})


def test_texts_in_turn_without_a_last_answer_are_refused() -> None:
    with pytest.raises(DataError, match="a list of 3 texts"):
        sample_of({"conversations": [ASKED, SAID, ASKED]})


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"instruction": ASKED, "input": "a", "context": "b", "response": SAID}, "context is 'b'"),
        ({"instruction": ASKED, "output": SAID, "response": "Other."}, "are both given"),
        ({"input": ASKED, "output": SAID, "prompt": "a", "completion": "b"}, "are both given"),
        ({"input": ["a", "b"], "output": SAID}, "input is"),
        ({"question": ASKED, "answer": SAID, "context": "It purrs."}, "context is 'It purrs.'"),
        ({"message_1": ASKED, "message_2": SAID, "messages": [{"role": "user"}]}, "turn 0"),
    ],
)
def test_what_would_be_lost_of_a_question_and_its_answer_is_refused(
    record: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        sample_of(record)
