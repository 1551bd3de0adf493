"""Needles: sentences with a code, hidden at chosen depths of a haystack of pages, with
questions."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_vita.data.samples.encoding import SampleEncoder
from megatron_vita.data.samples.records import pieces_of
from megatron_vita.errors import ConfigError
from megatron_vita.evaluation.pages import Book, PageStyle
from megatron_vita.inference.requests.prompt import MediaFile, Prompt
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
# Needles of one haystack need distinct names: their number bounds the depths of a grid.
NAMES = tuple(f"{color} {thing}" for color in COLORS for thing in THINGS)
LONGEST_ANSWER = 32  # tokens
MEDIA = ("images", "video")


@dataclass(frozen=True, kw_only=True)
class Needle:
    """A code of five digits, and the name of the lock it opens."""

    name: str
    code: str

    @property
    def sentence(self) -> str:
        """Sentence on the page."""
        return f"The access code of the {self.name} is {self.code}."

    @property
    def question(self) -> str:
        """Question at the end of the prompt."""
        return f"What is the access code of the {self.name}? Answer with its five digits alone."


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One question: pages of the haystack, depth of the needle (0 first page, 1 last), and
    trial."""

    pages: int
    depth: float
    trial: int

    @property
    def key(self) -> str:
        """Name of the question in results."""
        return f"{self.pages} pages, depth {self.depth:g}, trial {self.trial}"

    @property
    def page(self) -> int:
        """Index of the page with the needle."""
        return round(self.depth * (self.pages - 1))


@dataclass(frozen=True, kw_only=True)
class Haystack:
    """Settings shared by all cells. The same seed gives the same prompts.

    `shared`: needles of all depths lie in one haystack, so that an engine that caches prefixes
    computes each haystack once; needles not asked for are distractors.
    """

    book: Book
    seed: int = 0
    media: str = "images"
    shared: bool = False

    def __post_init__(self) -> None:
        if self.media not in MEDIA:
            raise ConfigError(f"media is {self.media!r}; known: {', '.join(MEDIA)}")

    def needle(self, cell: Cell, *, depths: Sequence[float]) -> Needle:
        """Return the needle that a cell asks for."""
        return self._needles(cell, depths=depths)[cell.depth]

    def prompt(self, cell: Cell, *, depths: Sequence[float]) -> Prompt:
        """Build a cell's prompt: all pages, then the question. `depths` are those of the whole
        grid."""
        needles = self._needles(cell, depths=depths)
        hidden = needles
        if not self.shared:
            hidden = {cell.depth: needles[cell.depth]}
        replaced = self._places(cell, hidden)
        # Trials begin at different places of the text, so that they do not repeat one haystack.
        first = self._random(cell, "start").randrange(len(self.book.lines))
        pages = [self.book.page(first + page, replaced.get(page, {})) for page in range(cell.pages)]
        return as_prompt(pages, needles[cell.depth].question, media=self.media)

    def _needles(self, cell: Cell, *, depths: Sequence[float]) -> dict[float, Needle]:
        if len(depths) > len(NAMES):
            raise ConfigError(
                f"{len(depths)} depths are asked for: at most {len(NAMES)} are possible"
            )
        # Codes and names are drawn for all depths, hidden or not: a question is then the same with
        # and without `shared`.
        draw = self._random(cell, "needles")
        codes = [str(code) for code in draw.sample(range(10_000, 100_000), len(depths))]
        chosen = draw.sample(NAMES, len(depths))
        return {d: Needle(name=n, code=c) for d, n, c in zip(depths, chosen, codes, strict=True)}

    def _places(self, cell: Cell, hidden: dict[float, Needle]) -> dict[int, dict[int, str]]:
        """Return page -> line -> text, with separate lines for each needle on a page."""
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
                    f"{len(needles)} needles of {len(wrapped)} lines fall on a page of "
                    f"{style.lines} lines: choose fewer depths, longer haystacks or larger pages"
                )
            start = index * room + draw.randrange(room - len(wrapped) + 1)
            lines |= {start + offset: text for offset, text in enumerate(wrapped)}
        return lines

    def _random(self, cell: Cell, purpose: str) -> random.Random:
        # By pages and trial, not by depth: cells that share a haystack must build the same one.
        return random.Random(f"{self.seed} {cell.pages} {cell.trial} {purpose}")


def as_prompt(pages: Iterable[bytes], question: str, *, media: str) -> Prompt:
    """Build a prompt of pages, as an image each or as a video with a second each, and a
    question."""
    files = [MediaFile(name=f"page-{number}.png", data=page) for number, page in enumerate(pages)]
    if media == "images":
        return Prompt.ask(question, images=files)
    video = pack_frames([(file.name, file.data) for file in files], fps=1.0)
    return Prompt.ask(question, videos=[MediaFile(name="pages.frames.zip", data=video)])


def count_tokens(pages: int, *, encoder: SampleEncoder, style: PageStyle, media: str) -> int:
    """Count the most tokens of a prompt with `pages` pages.

    Raises:
        ConfigError: the model would not see all frames of the video.
    """
    # Of the longest name: no question may exceed the context.
    text = max(_text_tokens(name, pages, encoder=encoder, media=media) for name in NAMES)
    if media == "images":
        return text + pages * encoder.measure_image((style.size, style.size))[0]
    tokens, frames = encoder.measure_video(VideoInfo(duration=float(pages), fps=1.0, frames=pages))
    if frames < pages:
        raise ConfigError(
            f"of a video of {pages} pages the model sees {frames}: media.max_frames is "
            f"{encoder.media.max_frames} and media.max_fps {encoder.media.max_fps}"
        )
    return text + tokens


def _text_tokens(name: str, pages: int, *, encoder: SampleEncoder, media: str) -> int:
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
    turns = encoder.chat.prompt(check_messages(sample, needs_answer=False))
    return sum(pieces_of(turns)[1])


def pages_within(tokens: int, *, encoder: SampleEncoder, style: PageStyle, media: str) -> int:
    """Return the most pages of a prompt with at most `tokens` tokens.

    Raises:
        ConfigError: not even one page fits.
    """
    # Tokens grow by the same number with each page, but for labels (see below).
    one, two = (count_tokens(pages, encoder=encoder, style=style, media=media) for pages in (1, 2))
    pages = 1 + (tokens - one) // (two - one)
    if pages < 1:
        raise ConfigError(f"a length of {tokens} tokens is asked for: a single page takes {one}")
    # Labels of frames may take more tokens as their numbers get more digits.
    while count_tokens(pages, encoder=encoder, style=style, media=media) > tokens:
        pages -= 1
    return pages
