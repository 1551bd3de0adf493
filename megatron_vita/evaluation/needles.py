"""Needles: sentences with a code, hidden on the pages of a haystack at chosen depths, and the
questions for them."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_vita.data.samples.encoding import DocumentFormat
from megatron_vita.data.samples.records import pieces_of
from megatron_vita.errors import ConfigError
from megatron_vita.evaluation.pages import Book, PageStyle
from megatron_vita.inference.prompt import MediaFile, Prompt
from megatron_vita.media.frame_archive import pack_frames
from megatron_vita.media.video import VideoInfo
from megatron_vita.text.conversation import check_messages

COLORS = (
    "red",
    "blue",
    "green",
    "yellow",
    "black",
    "white",
    "brown",
    "orange",
    "purple",
    "grey",
    "pink",
    "golden",
)
THINGS = ("door", "gate", "safe", "locker", "cabinet", "drawer", "chest", "garage")
NAMES = tuple(f"{color} {thing}" for color in COLORS for thing in THINGS)
LONGEST_ANSWER = 32  # tokens
MEDIA = ("images", "video")


@dataclass(frozen=True, kw_only=True)
class Needle:
    """A code of five digits, and what it opens."""

    name: str
    code: str

    @property
    def sentence(self) -> str:
        """What stands on the page."""
        return f"The access code of the {self.name} is {self.code}."

    @property
    def question(self) -> str:
        """What is asked at the end."""
        return f"What is the access code of the {self.name}? Answer with its five digits alone."


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One question: pages of the haystack, depth of the needle in it (0 first page, 1 last), and
    which try."""

    pages: int
    depth: float
    trial: int

    @property
    def key(self) -> str:
        """Its name in results."""
        return f"{self.pages} pages, depth {self.depth:g}, trial {self.trial}"

    @property
    def page(self) -> int:
        """The page with the needle."""
        return round(self.depth * (self.pages - 1))


@dataclass(frozen=True, kw_only=True)
class Haystack:
    """What cells have in common. The same seed gives the same prompts.

    `shared`: needles of all depths lie in one haystack. Whoever reuses a common beginning of
    prompts then reads each haystack once; needles not asked for are distractors.
    """

    book: Book
    seed: int = 0
    media: str = "images"
    shared: bool = False

    def __post_init__(self) -> None:
        if self.media not in MEDIA:
            raise ConfigError(f"media is {self.media!r}; known: {', '.join(MEDIA)}")

    def needle(self, cell: Cell, *, depths: Sequence[float]) -> Needle:
        """The needle that a cell asks for."""
        return self._needles(cell, depths=depths)[cell.depth]

    def prompt(self, cell: Cell, *, depths: Sequence[float]) -> Prompt:
        """All pages, then the question. `depths` are those of the whole grid."""
        needles = self._needles(cell, depths=depths)
        hidden = needles if self.shared else {cell.depth: needles[cell.depth]}
        replaced = self._places(cell, hidden)
        first = self._random(cell, "start").randrange(len(self.book.lines))
        pages = [self.book.page(first + page, replaced.get(page, {})) for page in range(cell.pages)]
        return as_prompt(pages, needles[cell.depth].question, media=self.media)

    def _needles(self, cell: Cell, *, depths: Sequence[float]) -> dict[float, Needle]:
        if len(depths) > len(NAMES):
            raise ConfigError(
                f"{len(depths)} depths are asked for: at most {len(NAMES)} are possible"
            )
        draw = self._random(cell, "needles")
        codes = [str(code) for code in draw.sample(range(10_000, 100_000), len(depths))]
        chosen = draw.sample(NAMES, len(depths))
        return {d: Needle(name=n, code=c) for d, n, c in zip(depths, chosen, codes, strict=True)}

    def _places(self, cell: Cell, hidden: dict[float, Needle]) -> dict[int, dict[int, str]]:
        """Page -> line -> text: each needle in a part of its page that it has for itself."""
        on_page: dict[int, list[Needle]] = {}
        for depth, needle in hidden.items():
            on_page.setdefault(
                Cell(pages=cell.pages, depth=depth, trial=cell.trial).page, []
            ).append(needle)
        draw = self._random(cell, f"places {[*hidden]}")
        return {page: self._lines(needles, draw) for page, needles in on_page.items()}

    def _lines(self, needles: list[Needle], draw: random.Random) -> dict[int, str]:
        style = self.book.style
        room = style.lines // len(needles)
        lines: dict[int, str] = {}
        for index, needle in enumerate(needles):
            wrapped = style.wrap(needle.sentence)[:-1]
            if len(wrapped) > room:
                raise ConfigError(
                    f"{len(needles)} needles of {len(wrapped)} lines fall on a page of {style.lines} lines: "
                    "choose fewer depths, longer haystacks or larger pages"
                )
            start = index * room + draw.randrange(room - len(wrapped) + 1)
            lines |= {start + offset: text for offset, text in enumerate(wrapped)}
        return lines

    def _random(self, cell: Cell, purpose: str) -> random.Random:
        return random.Random(f"{self.seed} {cell.pages} {cell.trial} {purpose}")


def as_prompt(pages: Iterable[bytes], question: str, *, media: str) -> Prompt:
    """A question after its pages: an image each, or frames of one video, a second each."""
    files = [MediaFile(name=f"page-{number}.png", data=page) for number, page in enumerate(pages)]
    if media == "images":
        return Prompt.ask(question, images=files)
    video = pack_frames([(file.name, file.data) for file in files], fps=1.0)
    return Prompt.ask(question, videos=[MediaFile(name="pages.frames.zip", data=video)])


def count_tokens(pages: int, *, form: DocumentFormat, style: PageStyle, media: str) -> int:
    """Most tokens of a prompt of so many pages. ConfigError if frames of a video would be left
    out."""
    text = max(_text_tokens(name, pages, form=form, media=media) for name in NAMES)
    if media == "images":
        return text + pages * form.measure_image((style.size, style.size))[0]
    tokens, frames = form.measure_video(VideoInfo(duration=float(pages), fps=1.0, frames=pages))
    if frames < pages:
        raise ConfigError(
            f"of a video of {pages} pages the model sees {frames}: media.max_frames is {form.media.max_frames} "
            f"and media.max_fps {form.media.max_fps}"
        )
    return text + tokens


def _text_tokens(name: str, pages: int, *, form: DocumentFormat, media: str) -> int:
    """Tokens of a prompt without those of its media."""
    question = Needle(name=name, code="").question
    page = MediaFile(name="", data=b"")
    if media == "images":
        prompt = Prompt.ask(question, images=[page] * pages)
    else:
        prompt = Prompt.ask(question, videos=[page])
    sample = {
        "messages": prompt.messages,
        "images": list(prompt.images),
        "videos": list(prompt.videos),
    }
    turns = form.chat.prompt(check_messages(sample, needs_answer=False))
    return sum(pieces_of(turns)[1])


def pages_within(tokens: int, *, form: DocumentFormat, style: PageStyle, media: str) -> int:
    """Most pages whose prompt has at most so many tokens. ConfigError if not even one fits."""
    one, two = (count_tokens(pages, form=form, style=style, media=media) for pages in (1, 2))
    pages = 1 + (tokens - one) // (two - one)
    if pages < 1:
        raise ConfigError(f"a length of {tokens} tokens is asked for: a single page takes {one}")
    # frames may have labels whose length grows with their number
    while count_tokens(pages, form=form, style=style, media=media) > tokens:
        pages -= 1
    return pages
