"""Conversion of easy-VQA (PyPI package `easy-vqa`, MIT licence) to chat JSONL: captions for stage
1, questions for stage 2.

    python -m examples.easy_vqa.prepare FOLDER

Captions such as "a red triangle" are made from the training questions and answers alone. A hundred
training images are held out for validation, on which settings are to be chosen; the published test
split is not touched.

Questions are divided into three data sets, whose losses are told apart in the log: `open` (color and
shape), and yes/no questions with the `usual` and with the `unusual` answer to their wording. "Is
there a red shape?" is "no" for four images of five, and a model first learns just this.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import easy_vqa

PACKAGE = Path(easy_vqa.__file__).parent / "data"
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
HELD_OUT_IMAGES = 100
Part = Literal["test", "validation"]
"""Questions to answer: the published test split, or those held out of the training split."""
DATASETS = ("open", "usual", "unusual")


@dataclass(frozen=True)
class Question:
    """A published question with its answer; `image` is the number of its picture."""

    text: str
    answer: str
    image: int

    @property
    def kind(self) -> str:
        """Kind of question: yes/no, color or shape."""
        if self.answer in ("yes", "no"):
            return "yes/no"
        if self.answer in COLORS:
            return "color"
        return "shape"


def read_questions(split: str) -> list[Question]:
    """All questions of the `train` or `test` split, in published order."""
    return [Question(*row) for row in json.loads((PACKAGE / split / "questions.json").read_text())]


def image_path(split: str, image: int) -> Path:
    """Path of a question's picture."""
    return PACKAGE / split / "images" / f"{image}.png"


def caption(questions: Iterable[Question]) -> str | None:
    """Caption of an image from its questions and answers, such as "a red triangle"; None if colour
    or shape is missing."""
    true_words = set()
    for question in questions:
        if question.kind != "yes/no":
            true_words.add(question.answer)
        # "Is there a red triangle?" answered yes and "Is there no ...?" answered no say the same.
        negated = {"not", "no"} & set(question.text.split())
        if question.kind != "yes/no" or (question.answer == "yes") != bool(negated):
            true_words |= set(question.text.rstrip("?").split())
    colors = true_words.intersection(COLORS)
    shapes = true_words.intersection(SHAPES)
    if colors and shapes:
        return f"a {colors.pop()} {shapes.pop()}"
    return None


def question_sample(question: Question, split: str) -> dict:
    """One question as a conversation."""
    return _sample(f"<image>\n{question.text}", question.answer, image_path(split, question.image))


def write_jsonl(samples: Iterable[dict], path: Path) -> None:
    """Write one sample per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def usual_answers(questions: Iterable[Question]) -> dict[str, str]:
    """Map the text of each question to its most frequent answer."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        answers[question.text][question.answer] += 1
    return {text: counts.most_common(1)[0][0] for text, counts in answers.items()}


def dataset_of(question: Question, usual: Mapping[str, str]) -> str:
    """Name of the data set of a question: open, usual or unusual."""
    if question.kind != "yes/no":
        return "open"
    if question.answer == usual[question.text]:
        return "usual"
    return "unusual"


def prepare(folder: Path) -> None:
    """Write {captions,open,usual,unusual}-{train,validation}.jsonl, and a link `media` to the
    folder that their image names start from."""
    folder.mkdir(parents=True, exist_ok=True)
    media = folder / "media"
    media.unlink(missing_ok=True)
    media.symlink_to(PACKAGE)
    train, validation = divide_training_split()
    usual = usual_answers(train)
    for split, chosen in (("train", train), ("validation", validation)):
        write_jsonl(caption_samples(chosen), folder / f"captions-{split}.jsonl")
        for name in DATASETS:
            questions = [q for q in chosen if dataset_of(q, usual) == name]
            samples = (question_sample(question, "train") for question in questions)
            write_jsonl(samples, folder / f"{name}-{split}.jsonl")


def divide_training_split() -> tuple[list[Question], list[Question]]:
    """Questions of the training split to train on, and those about the held-out images."""
    questions = read_questions("train")
    # Split by image, not by question: questions about one image must not be on both sides.
    held_out = set(sorted({question.image for question in questions})[:HELD_OUT_IMAGES])
    train = [question for question in questions if question.image not in held_out]
    validation = [question for question in questions if question.image in held_out]
    return train, validation


def caption_samples(questions: Iterable[Question]) -> Iterator[dict]:
    """Captions of the images of training questions, where the questions tell them."""
    by_image: dict[int, list[Question]] = defaultdict(list)
    for question in questions:
        by_image[question.image].append(question)
    for image, mine in by_image.items():
        if said := caption(mine):
            yield _sample("<image>", said, image_path("train", image))


def _sample(user: str, assistant: str, image: Path) -> dict:
    return {
        "messages": [
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
        ],
        "images": [str(image.relative_to(PACKAGE))],
    }


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
