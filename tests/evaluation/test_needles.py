"""Codes on pages: where they lie, what is asked, how it is graded, and that a killed run goes
on."""

import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_vita.config import MediaConfig, TextConfig, VisionConfig
from megatron_vita.data.samples.documents import assemble_document
from megatron_vita.data.samples.encoding import SampleEncoder
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.evaluation.answering import Reply
from megatron_vita.evaluation.needle_run import NeedleGrid, run_needles
from megatron_vita.evaluation.needles import Cell, Haystack, Needle, count_tokens, pages_within
from megatron_vita.evaluation.pages import Book, PageStyle, read_text
from megatron_vita.inference.requests.prompt import Prompt
from megatron_vita.inference.requests.types import SamplingParams
from megatron_vita.media.images import image_size
from megatron_vita.media.video import decode_frames, frame_times, probe_video
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.conversation import check_messages
from megatron_vita.text.tokenizer import load_tokenizer
from megatron_vita.text.train import train_sentencepiece

DEPTHS = (0.0, 0.5, 1.0)
STYLE = PageStyle(size=224, font_size=8)
BOOK = Book(
    "Once upon a time there was a page.\n\nIt was followed by another one.\n\n" * 9, style=STYLE
)


class Reader:
    """Finds the requested sentence, since it knows the haystack; answers wrongly where `misses`
    says so."""

    def __init__(
        self, haystack: Haystack, cells: Iterable[Cell], misses: set[str] | None = None
    ) -> None:
        self.haystack = haystack
        self.cells = list(cells)
        self.misses = misses or set()
        self.asked: list[Prompt] = []
        self.stop_after: int | None = None

    def answers(self, prompts: Iterable[Prompt], *, sampling: SamplingParams) -> Iterator[Reply]:
        codes = {
            fingerprint(self.haystack.prompt(cell, depths=DEPTHS)): self.code(cell)
            for cell in self.cells
        }
        for prompt in prompts:
            if self.stop_after is not None and len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(prompt)
            yield Reply(
                text=f"It is {codes[fingerprint(prompt)]}.", prompt_tokens=100 * len(prompt.images)
            )

    def code(self, cell: Cell) -> str:
        if cell.key in self.misses:
            return "0"
        return self.haystack.needle(cell, depths=DEPTHS).code


def fingerprint(prompt: Prompt) -> str:
    return repr(prompt)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def changed_pages(haystack: Haystack, cell: Cell) -> list[int]:
    """Pages that differ from the book's."""
    first = haystack._random(cell, "start").randrange(len(BOOK.lines))
    pages = haystack.prompt(cell, depths=DEPTHS).images
    return [i for i, page in enumerate(pages) if page.data != BOOK.page(first + i, {})]


def test_a_needle_lies_on_one_page_at_its_depth() -> None:
    haystack = Haystack(book=BOOK)
    for depth, page in ((0.0, 0), (0.5, 4), (1.0, 8)):
        assert changed_pages(haystack, Cell(pages=9, depth=depth, trial=0)) == [page]


def test_a_needle_is_drawn_whole_between_lines_of_the_book() -> None:
    for trial in range(20):
        haystack = Haystack(book=BOOK)
        cell = Cell(pages=1, depth=0.5, trial=trial)
        lines = haystack._places(cell, {0.5: haystack.needle(cell, depths=DEPTHS)})[0]
        assert " ".join(lines.values()) == haystack.needle(cell, depths=DEPTHS).sentence
        assert min(lines) >= 0
        assert max(lines) < STYLE.lines
        assert all(len(line) <= STYLE.columns for line in lines.values())


def test_the_same_seed_gives_the_same_prompt_and_another_differs() -> None:
    cell = Cell(pages=4, depth=0.5, trial=1)
    one, same, other = (
        Haystack(book=BOOK, seed=seed).prompt(cell, depths=DEPTHS) for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other
    tries = [
        Haystack(book=BOOK).needle(Cell(pages=4, depth=0.5, trial=t), depths=DEPTHS).code
        for t in range(10)
    ]
    assert len(set(tries)) == 10


def test_cells_of_a_shared_haystack_differ_in_the_question_alone() -> None:
    haystack = Haystack(book=BOOK, shared=True)
    prompts = [
        haystack.prompt(Cell(pages=9, depth=depth, trial=0), depths=DEPTHS) for depth in DEPTHS
    ]
    assert prompts[0].images == prompts[1].images == prompts[2].images
    assert len({prompt.messages[0]["content"][-1]["text"] for prompt in prompts}) == 3
    assert changed_pages(haystack, Cell(pages=9, depth=0.5, trial=0)) == [0, 4, 8]


def test_a_needle_of_the_longest_name_fits_a_tile_of_128_pixels() -> None:
    style = PageStyle(size=128, font_size=12)
    assert (style.columns, style.lines) == (14, 6)
    lines = style.wrap(Needle(name="purple cabinet", code="73914").sentence)[:-1]
    assert lines == ["The access", "code of the", "purple cabinet", "is 73914."]
    haystack = Haystack(book=Book("A page of a few words. " * 40, style=style))
    cells = [Cell(pages=3, depth=0.5, trial=trial) for trial in range(20)]
    assert all(len(haystack.prompt(cell, depths=DEPTHS).images) == 3 for cell in cells)


def test_needles_that_share_a_page_do_not_cover_one_another() -> None:
    haystack = Haystack(book=BOOK, shared=True)
    cell = Cell(pages=1, depth=0.5, trial=0)
    needles = haystack._needles(cell, depths=DEPTHS)
    lines = haystack._places(cell, needles)[0]
    text = " ".join(lines[line] for line in sorted(lines))
    assert all(needle.sentence in text for needle in needles.values())
    many = tuple(index / 40 for index in range(41))
    with pytest.raises(ConfigError, match="choose fewer depths"):
        haystack.prompt(cell, depths=many)


def test_a_page_shows_its_text_within_its_margins() -> None:
    page = pixels(BOOK.page(0, {2: "W" * STYLE.columns}))
    assert page.shape == (224, 224)
    dark = np.argwhere(page < 128)
    assert dark.min() >= STYLE.margin - 1
    assert dark.max() <= 224 - STYLE.margin + 1
    assert page[:, : STYLE.margin - 1].min() == 255


def test_pages_as_a_video_are_its_frames_in_order() -> None:
    cell = Cell(pages=5, depth=0.5, trial=0)
    images = Haystack(book=BOOK).prompt(cell, depths=DEPTHS).images
    (video,) = Haystack(book=BOOK, media="video").prompt(cell, depths=DEPTHS).videos
    info = probe_video(video.data, video.name)
    times = frame_times(info, max_fps=1.0, max_frames=99)
    frames = decode_frames(video.data, video.name, times=times, tile_size=224)
    assert len(frames) == 5
    for frame, image in zip(frames, images, strict=True):
        assert np.abs(frame[0].astype(int) - pixels(image.data)).max() <= 1


@pytest.fixture(scope="module", params=["long_vita", "internvl"])
def encoder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> SampleEncoder:
    model = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    train_sentencepiece(
        ["the access code of the red door is five digits"] * 50, model, vocab_size=300
    )
    return SampleEncoder(
        chat=ChatFormat(load_tokenizer(str(model)), TextConfig(media_format=request.param)),
        media=MediaConfig(max_tiles=4, max_frames=100),
        vision=VisionConfig(image_size=112, patch_size=14),
    )


@pytest.mark.parametrize("media", ["images", "video"])
def test_a_length_in_tokens_is_the_longest_haystack_within_it(
    encoder: SampleEncoder, media: str
) -> None:
    pages = pages_within(1500, encoder=encoder, style=STYLE, media=media)
    haystack = Haystack(book=BOOK, media=media)
    longest = max(
        prompt_tokens(haystack.prompt(cell, depths=DEPTHS), encoder) for cell in trials(pages)
    )
    assert longest <= count_tokens(pages, encoder=encoder, style=STYLE, media=media) <= 1500
    assert count_tokens(pages + 1, encoder=encoder, style=STYLE, media=media) > 1500
    assert count_tokens(pages, encoder=encoder, style=STYLE, media=media) - longest < 20


def trials(pages: int) -> list[Cell]:
    return [Cell(pages=pages, depth=0.5, trial=trial) for trial in range(12)]


def prompt_tokens(prompt: Prompt, encoder: SampleEncoder) -> int:
    """Number of tokens of the training document of a prompt, including the opening of the answer."""
    media = {
        "image": [encoder.image(i.name, image_size(i.data, i.name)) for i in prompt.images],
        "video": [encoder.video(v.name, probe_video(v.data, v.name)) for v in prompt.videos],
    }
    sample = {
        "messages": prompt.messages,
        "images": list(prompt.images),
        "videos": list(prompt.videos),
    }
    turns = encoder.chat.prompt(check_messages(sample, needs_answer=False))
    return len(assemble_document(turns, key="prompt", media=media, encoder=encoder))


def test_lengths_that_cannot_be_are_refused(encoder: SampleEncoder) -> None:
    with pytest.raises(ConfigError, match="a single page takes"):
        pages_within(10, encoder=encoder, style=STYLE, media="images")
    with pytest.raises(ConfigError, match=r"media\.max_frames is 100"):
        pages_within(100_000, encoder=encoder, style=STYLE, media="video")


def test_wrong_pages_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No Such Font"):
        Book("words", style=PageStyle(font="No Such Font"))
    with pytest.raises(ConfigError, match="holds 1 lines of 3 characters: at least 4 of 10"):
        Book("words", style=PageStyle(size=64))
    with pytest.raises(DataError, match="no words"):
        Book(" \n ", style=STYLE)
    with pytest.raises(DataError, match=r"none\.txt"):
        read_text([tmp_path / "none.txt"])
    with pytest.raises(ConfigError, match="'pdf'"):
        Haystack(book=BOOK, media="pdf")
    assert len(read_text([])) > 100_000


GRID = NeedleGrid(pages=(1, 3), depths=DEPTHS, needles=2)
HAYSTACK = Haystack(book=BOOK)


def run(folder: Path, reader: Reader, **changes: object) -> dict:
    options = {"haystack": HAYSTACK, "grid": GRID, "folder": folder, "model": "reader"} | changes
    return run_needles(reader, **options)  # type: ignore[arg-type]


def test_the_report_tells_what_was_found_where(tmp_path: Path) -> None:
    missed = Cell(pages=3, depth=1.0, trial=1)
    report = run(tmp_path, Reader(HAYSTACK, GRID.cells(), {missed.key}))
    assert (report["right"], report["asked"], report["refused"]) == (11, 12, 0)
    assert report["shares"] == [[1, 1], [1, 1], [1, 0.5]]
    assert report["lengths"] == [{"pages": 1, "tokens": 100}, {"pages": 3, "tokens": 300}]
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    page = (tmp_path / "report.md").read_text()
    assert "| 100% | 100% | 50% |" in page
    assert re.search(r"\| 3 \| 100% \| \d{5} \| It is 0\. \|", page)
    with Image.open(tmp_path / "heat_map.png") as image:
        assert image.format == "PNG"


def test_a_run_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Reader(HAYSTACK, GRID.cells()))
    reader = Reader(HAYSTACK, GRID.cells())
    reader.stop_after = 5
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", reader)
    log = tmp_path / "killed" / "needles.jsonl"
    assert len(log.read_text().splitlines()) == 5
    log.write_text(log.read_text()[:-9])  # the last row was cut short
    rest = Reader(HAYSTACK, GRID.cells())
    assert run(tmp_path / "killed", rest) == whole
    assert len(rest.asked) == 12 - 4


def test_more_lengths_and_needles_add_to_what_is_there_and_other_settings_are_refused(
    tmp_path: Path,
) -> None:
    run(tmp_path, Reader(HAYSTACK, GRID.cells()))
    longer = NeedleGrid(pages=(1, 3, 4), depths=DEPTHS, needles=3)
    reader = Reader(HAYSTACK, longer.cells())
    assert run(tmp_path, reader, grid=longer)["asked"] == 27
    assert len(reader.asked) == 27 - 12
    with pytest.raises(ConfigError, match="seed 0, and now it is 1"):
        run(tmp_path, reader, haystack=Haystack(book=BOOK, seed=1))
    with pytest.raises(ConfigError, match="model 'reader', and now it is 'writer'"):
        run(tmp_path, reader, model="writer")


def test_a_refused_prompt_counts_as_wrong_and_is_asked_again(tmp_path: Path) -> None:
    class Refuses(Reader):
        def answers(
            self, prompts: Iterable[Prompt], *, sampling: SamplingParams
        ) -> Iterator[Reply]:
            for prompt in prompts:
                long = len(prompt.images) == 3
                yield (
                    Reply(error="too long")
                    if long
                    else next(super().answers([prompt], sampling=sampling))
                )

    report = run(tmp_path, Refuses(HAYSTACK, GRID.cells()))
    assert (report["right"], report["refused"]) == (6, 6)
    page = (tmp_path / "report.md").read_text()
    assert "6 prompts were refused; their codes count as not found:" in page
    for row in report["refused_prompts"]:
        assert f"* {row['name']}: too long" in page
    assert {row["name"].partition(" pages, ")[0] for row in report["refused_prompts"]} == {"3"}
    reader = Reader(HAYSTACK, GRID.cells())
    assert run(tmp_path, reader)["right"] == 12
    assert len(reader.asked) == 6
