"""Questions that no stage trains on, as chat JSONL, and the same questions about other media."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from examples.four_stages.films import Length
from examples.four_stages.made import Maker, make_all, record, write_media
from examples.four_stages.pictures import DESCRIBE
from examples.four_stages.sets import Amounts, Films, sample_set
from megatron_vita.errors import DataError
from megatron_vita.files import write_json_lines

Row = dict[str, Any]
SWAPPED = "-swapped"


@dataclass(frozen=True, kw_only=True)
class TestAmounts:
    """Samples of each kind of question; each has one or more questions."""

    shapes: int
    pictures: int  # words, pages, counts
    sheets: int
    short: int  # films, albums and clock films of up to 24 frames
    captions: int
    stamps: int
    moments: Sequence[Films]


FULL_TESTS = TestAmounts(
    shapes=400,
    pictures=100,
    sheets=60,
    short=50,
    captions=200,
    stamps=98,
    moments=(
        Films(length=Length(least=20, most=24, questions=6), count=30),
        Films(length=Length(least=460, most=470, questions=10), count=10),
        Films(length=Length(least=1900, most=1930, questions=12), count=6),
    ),
)
MINIATURE_TESTS = TestAmounts(
    shapes=4,
    pictures=2,
    sheets=2,
    short=2,
    captions=2,
    stamps=2,
    moments=(Films(length=Length(least=8, most=10, questions=3), count=2),),
)


def write_tests(amounts: TestAmounts, sets: Amounts, *, material: Path, folder: Path) -> list[Path]:
    """Write short.jsonl, captions.jsonl and moments.jsonl, each also with media swapped.

    Args:
        sets: amounts of the training sets, of which the lengths of films are taken.
        material: folder of the packages' files.
        folder: for the files, and their media in `media`.
    """
    kinds = {
        "short": {
            "shape_questions": amounts.shapes,
            "words": amounts.pictures,
            "pages": amounts.pictures,
            "counts": amounts.pictures,
            "sheets": amounts.sheets,
            "films_short": amounts.short,
            "albums_short": amounts.short,
            "clocks_short": amounts.short,
        },
        "captions": {"shape_captions": amounts.captions, "stamps": amounts.stamps},
    }
    moments = sum(row.count for row in amounts.moments)
    kinds["moments"] = {"clocks": moments}
    # All that the published split has, of which an even choice is asked.
    every = replace(sets, shapes=0, stamp_copies=1, clocks=amounts.moments)
    written = []
    for name, counts in kinds.items():
        rows: list[Row] = []
        for kind, count in counts.items():
            made = sample_set(kind, every, material=material, part="held-out")
            rows += _questions(kind, made.maker, folder=folder, indexes=_spread(made.count, count))
        written += _write(name, rows, folder)
    return written


def _spread(total: int, count: int) -> list[int]:
    """`count` numbers below `total`, evenly spread."""
    count = min(count, total)
    return [index * total // count for index in range(count)]


def _questions(name: str, maker: Maker, *, folder: Path, indexes: Sequence[int]) -> Iterator[Row]:
    """Yield a sample for each question of the chosen samples; their media are written once."""
    for index, made in zip(indexes, make_all(maker, indexes), strict=True):
        paths = write_media(made, name, index, media=folder / "media")
        for question, answer in made.turns:
            # A stamp's caption can be worded in many ways: its category is asked for.
            if name == "stamps" and question == DESCRIBE:
                continue
            yield record(replace(made, turns=[(question, answer)]), paths)


def _write(name: str, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the questions, and the control with swapped media."""
    files = {folder / f"{name}.jsonl": rows, folder / f"{name}{SWAPPED}.jsonl": swap_media(rows)}
    for path, lines in files.items():
        write_json_lines(path, lines)
    return list(files)


def swap_media(rows: Sequence[Row]) -> list[Row]:
    """Give each question the media of another sample of its kind, half of them further on.

    What a model still gets right, it has from the question.

    Raises:
        DataError: all samples of a kind have the same media, so that there is nothing to swap.
    """
    media: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        own = _media_of(row)
        if own not in media[row["kind"]]:
            media[row["kind"]].append(own)
    swapped = []
    for row in rows:
        known = media[row["kind"]]
        if len(known) < 2:
            raise DataError(
                f"the tests have one sample of the kind {row['kind']!r}: a control with swapped media needs two"
            )
        other = json.loads(known[(known.index(_media_of(row)) + len(known) // 2) % len(known)])
        swapped.append(_with_media(row, other))
    return swapped


def _media_of(row: Row) -> str:
    """Media of a sample, as a text to compare."""
    return json.dumps({name: row[name] for name in ("images", "videos") if name in row})


def _with_media(row: Row, media: dict[str, list[str]]) -> Row:
    """A sample with other media of the same kind, of which there may be more or fewer."""
    (paths,) = media.values()
    (name,) = media
    tag = f"<{name.removesuffix('s')}>"
    question = row["messages"][0]["content"].replace(tag, "")
    first = {"role": "user", "content": tag * len(paths) + question}
    return row | media | {"messages": [first, *row["messages"][1:]]}
