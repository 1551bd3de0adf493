"""Scores of a stage: held-out questions and needles, each with the control of swapped media."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from examples.four_stages.heldout import SWAPPED
from examples.four_stages.run_folder import RunFolder
from examples.four_stages.texts import PAGE, book_of
from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.checkpoint.manifest import MANIFEST
from megatron_vita.checkpoint.tokenizer_copy import find_tokenizer
from megatron_vita.config import ParallelConfig
from megatron_vita.errors import ConfigError
from megatron_vita.evaluation.answering import EngineAnswerer
from megatron_vita.evaluation.needle_run import NeedleGrid, run_needles
from megatron_vita.evaluation.needles import Cell, Haystack, count_tokens, pages_within
from megatron_vita.evaluation.questions import read_questions, run_questions
from megatron_vita.files import atomic_write
from megatron_vita.inference.engine.engine import Engine
from megatron_vita.inference.engine.options import EngineOptions
from megatron_vita.inference.requests.prompt import Prompt

logger = logging.getLogger(__name__)
TESTS = ("short", "captions", "moments")
CONTROL_SEED = 1  # of the haystacks that the control shows in the place of the right ones
MOST_FRAMES = 20_000
MOMENTS_TOKENS = 128 << 10  # of the longest film of moments, which every stage is asked about
ANSWER_TOKENS = 48
LONG_ANSWER_TOKENS = 1024  # room in the context beside the longest haystack
AT_ONCE = 48  # short prompts in flight
AT_ONCE_LONG = 1  # one film at a time: its questions share the cached prefix


@dataclass(frozen=True, kw_only=True)
class NeedleLength:
    """Haystacks of at most `tokens`: how many of them, each asked at all depths."""

    tokens: int
    haystacks: int
    controls: int


@dataclass(frozen=True, kw_only=True)
class ScorePlan:
    """Needles that are looked for after a stage, and depths of each haystack."""

    lengths: Sequence[NeedleLength]
    depths: int = 10

    @property
    def context(self) -> int:
        """Tokens of the longest prompt of all tests, with its answer."""
        return max(MOMENTS_TOKENS, *(row.tokens for row in self.lengths)) + LONG_ANSWER_TOKENS


_SHORT = (
    NeedleLength(tokens=8 << 10, haystacks=6, controls=2),
    NeedleLength(tokens=32 << 10, haystacks=5, controls=2),
    NeedleLength(tokens=128 << 10, haystacks=5, controls=2),
)
_LONG = (
    NeedleLength(tokens=256 << 10, haystacks=2, controls=1),
    NeedleLength(tokens=512 << 10, haystacks=3, controls=1),
)
_LONGEST = NeedleLength(tokens=1 << 20, haystacks=1, controls=0)
FULL_PLANS = {
    1: ScorePlan(lengths=_SHORT[:1]),
    2: ScorePlan(lengths=_SHORT),
    3: ScorePlan(lengths=(*_SHORT, *(replace(row, haystacks=1, controls=0) for row in _LONG))),
    4: ScorePlan(lengths=(*_SHORT, *_LONG, _LONGEST)),
}
_MINIATURE = ScorePlan(
    lengths=(
        NeedleLength(tokens=200, haystacks=1, controls=1),
        NeedleLength(tokens=400, haystacks=1, controls=1),
    ),
    depths=2,
)
MINIATURE_PLANS = dict.fromkeys(FULL_PLANS, _MINIATURE)


@dataclass(frozen=True, kw_only=True)
class SwappedHaystack(Haystack):
    """A haystack that shows the pages of another one: its codes are nowhere to be seen."""

    shown: Haystack

    def prompt(self, cell: Cell, *, depths: Sequence[float]) -> Prompt:
        """Build a cell's prompt with its own question about the other haystack's pages."""
        other = self.shown.prompt(cell, depths=depths)
        question = self.needle(cell, depths=depths).question
        return Prompt.ask(question, images=other.images, videos=other.videos)


def plans_of(run_folder: RunFolder) -> Mapping[int, ScorePlan]:
    """Needles of each stage."""
    return MINIATURE_PLANS if run_folder.miniature else FULL_PLANS


def score(run_folder: RunFolder, stage: int) -> None:
    """Answer all questions that have no answer yet, and write the reports into the scores' folder.

    Raises:
        ConfigError: the scores there are of another checkpoint.
    """
    folder = run_folder.scores(stage)
    done = folder / "done"
    checkpoint = store.find_checkpoint(run_folder.checkpoints(stage))
    model = identity_of(checkpoint)
    if done.exists():
        _check_scored(done, model)
        return
    plan = plans_of(run_folder)[stage]
    engine = open_engine(checkpoint, context=plan.context)
    try:
        for test in TESTS:
            for name in (test, test + SWAPPED):
                ask_questions(
                    engine, run_folder.tests / f"{name}.jsonl", folder / name, model=model
                )
        for row in plan.lengths:
            look_for_needles(engine, row, depths=plan.depths, folder=folder, model=model)
    finally:
        engine.close()
    with atomic_write(done) as partial:
        partial.write_text(model)


def identity_of(checkpoint: Path) -> str:
    """Return a checkpoint's name and a digest of its manifest, which has a checksum of each file: a
    stage that is trained anew may end at the same step."""
    digest = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
    return f"{checkpoint.name} {digest[:12]}"


def _check_scored(done: Path, model: str) -> None:
    """Check that finished scores are those of a checkpoint.

    Raises:
        ConfigError: they are of another one.
    """
    scored = done.read_text()
    if scored != model:
        raise ConfigError(
            f"{done.parent}: holds the scores of {scored}, and the stage has been trained to {model}: remove the "
            "folder to score it again"
        )


def open_engine(checkpoint: Path, *, context: int) -> Engine:
    """Load a checkpoint for prompts of `context` tokens and any number of frames."""
    platform.initialize_process()
    recipe = store.recipe_of(checkpoint)
    fields: dict[str, Any] = {
        "text.tokenizer": find_tokenizer(checkpoint, recipe.text.tokenizer),
        # Short stages sample few frames in training; a test shows all of them to every stage.
        "media.max_frames": MOST_FRAMES,
    }
    return Engine(
        recipe.replaced(fields).with_layout(ParallelConfig()),
        options=EngineOptions(max_context=max(context, recipe.data.seq_length)),
        checkpoint=checkpoint,
    )


def ask_questions(engine: Engine, samples: Path, folder: Path, *, model: str) -> None:
    """Ask the questions of a file, grouped by their kind."""
    held_out = read_questions(samples, media=samples.parent / "media", group="kind")
    at_once = AT_ONCE_LONG if samples.stem.startswith("moments") else AT_ONCE
    run_questions(
        EngineAnswerer(engine, at_once=at_once),
        held_out,
        metric="exact",
        folder=folder,
        max_new_tokens=ANSWER_TOKENS,
        settings={"model": model, "samples": samples.name},
    )


def look_for_needles(
    engine: Engine, row: NeedleLength, *, depths: int, folder: Path, model: str
) -> None:
    """Ask for the codes of haystacks of one length, and as a control for codes that they lack."""
    own = Haystack(book=book_of("held-out"), media="video", shared=True)
    control = SwappedHaystack(
        book=own.book, media="video", shared=True, shown=replace(own, seed=CONTROL_SEED)
    )
    for name, haystack, count in (
        ("needles", own, row.haystacks),
        (f"needles{SWAPPED}", control, row.controls),
    ):
        if count:
            run_needles(
                EngineAnswerer(engine, at_once=AT_ONCE_LONG),
                haystack=haystack,
                grid=_grid(engine, row.tokens, depths=depths, haystacks=count),
                folder=folder / name / str(row.tokens),
                model=model,
            )


def _grid(engine: Engine, tokens: int, *, depths: int, haystacks: int) -> NeedleGrid:
    """Questions of the longest haystacks of at most `tokens`."""
    pages = pages_within(tokens, encoder=engine.encoder, style=PAGE, media="video")
    longest = count_tokens(pages, encoder=engine.encoder, style=PAGE, media="video")
    places = [index / (depths - 1) for index in range(depths)]
    return NeedleGrid(pages=[pages], depths=places, needles=haystacks, tokens={pages: longest})
