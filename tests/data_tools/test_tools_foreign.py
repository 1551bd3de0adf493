"""Records of other makers: each is used whole, or refused by the name of what is not understood."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.formats.base import Setting
from data_tools.importing import ImportJob, import_samples
from data_tools.workers.pool import WorkerOptions
from megatron_vita.media.data_urls import inline_content, is_inline
from megatron_vita.text.conversation import MediaPart, TextPart, check_messages
from tests.data_tools.foreign_cases import Case, make_cases
from tests.data_tools.foreign_layouts import FILES, LAYOUTS, Truth

CASES = 300
Result = dict[str, Any] | str  # a sample, or why there is none


def import_all(cases: list[Case], root: Path, foreign_media: Path) -> list[Result]:
    """Result of `import` for records of one layout."""
    root.mkdir()
    form = cases[0].layout.form
    if form == "hf":
        for number, case in enumerate(cases):
            pq.write_table(pa.Table.from_pylist([case.record]), root / f"{number:03d}.parquet")
        sources = sorted(root.iterdir())
    else:
        (root / "set.json").write_text(json.dumps([case.record for case in cases]))
        sources = [root / "set.json"]
    out = root / "out.jsonl"
    setting = Setting(media=foreign_media, media_out=root / "found", prompt=None)
    job = ImportJob(format=form, paths=sources, out=out, setting=setting)
    import_samples(job, options=WorkerOptions(workers=0))
    rejected = {number_of(entry): entry["reason"] for entry in read(out, ".rejected.jsonl")}
    samples = iter(read(out, ".jsonl"))
    return [rejected.get(number) or next(samples) for number in range(len(cases))]


def read(out: Path, suffix: str) -> list[Any]:
    return [json.loads(line) for line in out.with_suffix(suffix).read_text().splitlines()]


def number_of(entry: dict[str, str]) -> int:
    source = Path(entry["source"])
    if source.suffix == ".parquet":  # one case each
        return int(source.stem)
    return int(entry["place"].split()[1]) - 1


def told(truth: Truth) -> list[tuple[Any, ...]]:
    """The turns that a truth means: role, text, images, videos, whether it is trained."""
    turns: list[tuple[Any, ...]] = [("system", truth.system, 0, 0, True)] if truth.system else []
    for (question, answer, trained), images, videos in zip(
        truth.rounds, truth.images, truth.videos, strict=True
    ):
        turns.append(("user", question, len(images), len(videos), True))
        turns.append(("assistant", answer, 0, 0, trained))
    return turns


def found(sample: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The same of a sample."""
    turns = []
    for turn in check_messages(sample):
        text = "".join(part.text for part in turn.parts if isinstance(part, TextPart)).strip()
        counts = [turn.parts.count(MediaPart(kind)) for kind in ("image", "video")]
        turns.append((turn.role, text, *counts, turn.loss))
    return turns


def content(name: str, roots: list[Path]) -> bytes:
    if is_inline(name):
        return inline_content(name).rstrip(b"\0")
    return next(root / name for root in roots if (root / name).exists()).read_bytes()


def test_foreign_records_are_used_whole_or_refused_by_name(
    tmp_path: Path, foreign_media: Path
) -> None:
    cases = sorted(make_cases(CASES, seed=15), key=lambda case: LAYOUTS.index(case.layout))
    used = 0
    for layout, group in groupby(cases, key=lambda case: case.layout):
        mine = list(group)
        root = tmp_path / layout.name
        for case, result in zip(mine, import_all(mine, root, foreign_media), strict=True):
            shown = (
                f"{layout.name}, {case.refused or 'used'}: {case.record!r:.600} -> {result!r:.600}"
            )
            if case.refused:
                assert isinstance(result, str), shown
                assert case.refused in result, shown
                continue
            assert isinstance(result, dict), shown
            used += 1
            check_used(case.truth, result, [root / "found", foreign_media], shown)
    assert used > CASES / 2


def check_used(truth: Truth, sample: dict[str, Any], roots: list[Path], shown: str) -> None:
    names = {"images": truth.all_images, "videos": truth.all_videos}
    if "text" in sample:
        assert (sample, truth.all_images) == ({"text": truth.rounds[0][1]}, []), shown
        return
    assert found(sample) == told(truth), shown
    for field, expected in names.items():
        contents = [content(name, roots) for name in sample.get(field, [])]
        assert contents == [FILES[name].rstrip(b"\0") for name in expected], shown
