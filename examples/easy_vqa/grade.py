"""Grades of the published test questions, with baselines: no model, and wrong images."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from examples.easy_vqa.prepare import (
    Part,
    Question,
    divide_training_split,
    image_path,
    read_questions,
    usual_answers,
)
from megatron_vita.evaluation.answering import EngineAnswerer, Generates
from megatron_vita.evaluation.results import ResultLog, Task, run_tasks
from megatron_vita.inference.engine.engine import Engine
from megatron_vita.inference.requests.prompt import MediaFile, Prompt
from megatron_vita.inference.requests.types import SamplingParams

QUESTIONS_AT_ONCE = 96
LONGEST_ANSWER = 8  # tokens


@dataclass(frozen=True)
class Graded:
    """A test question with the model's answer."""

    text: str
    image: int
    kind: str
    right: str
    answer: str


def swap_images(questions: list[Question]) -> dict[int, int]:
    """Derangement of the images: each maps to the one half the list further on."""
    images = sorted({question.image for question in questions})
    # Half the list apart, no image is its own partner.
    half = len(images) // 2
    return dict(zip(images, images[half:] + images[:half], strict=True))


def answer_all(
    engine: Generates,
    questions: list[Question],
    *,
    path: Path,
    shown: Callable[[int], int],
    title: str,
    split: str = "test",
) -> list[Graded]:
    """Answer every question about the image `shown` for its own; finished answers are kept in
    `path` for a restart.

    split: the published split that the images are from.
    """

    def task(index: int, question: Question) -> Task:
        return Task(
            key=str(index),
            prompt=lambda: Prompt.ask(
                question.text, images=[MediaFile.read(image_path(split, shown(question.image)))]
            ),
            row=lambda reply: asdict(
                Graded(
                    question.text,
                    question.image,
                    question.kind,
                    question.answer,
                    reply.text.strip(),
                )
            ),
        )

    rows = run_tasks(
        [task(index, question) for index, question in enumerate(questions)],
        answerer=EngineAnswerer(engine, at_once=QUESTIONS_AT_ONCE),
        log=ResultLog(path),
        sampling=SamplingParams(max_new_tokens=LONGEST_ANSWER),
        title=title,
        unit="question",
    )
    # Through the log's rows, so that a restart grades what an earlier run has answered.
    return [Graded(**row) for row in rows]


def answer_blindly(
    test: list[Question], train: list[Question]
) -> tuple[list[Graded], list[Graded]]:
    """Baselines without images: the majority answer, and each question text's most frequent
    training answer."""
    # Counted on the training split: a baseline must not see the test's answers.
    majority = Counter(q.answer for q in train).most_common(1)[0][0]
    lookup = usual_answers(train)

    def graded(answer: Callable[[Question], str]) -> list[Graded]:
        return [Graded(q.text, q.image, q.kind, q.answer, answer(q)) for q in test]

    return graded(lambda _: majority), graded(lambda q: lookup.get(q.text, majority))


def accuracy(graded: list[Graded]) -> dict[str, float]:
    """Fraction of right answers, over all questions and for each kind."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for row in graded:
        for name in ("all", row.kind):
            groups[name].append(row.answer == row.right)
    return {name: sum(rights) / len(rights) for name, rights in groups.items()}


def grade(
    checkpoint: Path, folder: Path, *, part: Part = "test"
) -> tuple[dict[str, list[Graded]], int]:
    """All four columns of the report: model, model with swapped images, lookup by question,
    majority answer.

    Also the number of the model's parameters. Answers are kept in a folder of the checkpoint's
    name.

    part: the published test split, or the part of the training split that is not trained on.
    """
    train, asked = divide_training_split()
    split = "train"
    if part == "test":
        train = read_questions("train")
        asked = read_questions("test")
        split = "test"
    folder = folder / part / checkpoint.name
    folder.mkdir(parents=True, exist_ok=True)
    engine = Engine.from_checkpoint(checkpoint)
    swapped = swap_images(asked)
    majority, lookup = answer_blindly(asked, train)
    columns = {
        "model": answer_all(
            engine,
            asked,
            path=folder / "answers.jsonl",
            shown=int,
            title=f"answering the {part} questions",
            split=split,
        ),
        "swapped": answer_all(
            engine,
            asked,
            path=folder / "answers-swapped.jsonl",
            shown=swapped.__getitem__,
            title="with images swapped",
            split=split,
        ),
        "lookup": lookup,
        "majority": majority,
    }
    return columns, sum(p.numel() for p in engine.model.parameters())
