"""Conversion of easy-VQA (PyPI package `easy-vqa`, MIT licence) to chat JSONL: captions for stage
1, questions for stage 2.

    python -m examples.easy_vqa.prepare FOLDER

Captions such as "a red triangle" are made from the training questions and answers alone. A hundred
training images are held out for the validation loss; the published test split is not touched.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import easy_vqa

PACKAGE = Path(easy_vqa.__file__).parent / "data"
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
HELD_OUT_IMAGES = 100


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


def prepare(folder: Path) -> None:
    """Write {captions,questions}-{train,validation}.jsonl."""
    by_image: dict[int, list[Question]] = {}
    for question in read_questions("train"):
        by_image.setdefault(question.image, []).append(question)
    # Split by image, not by question: questions about one image must not be on both sides.
    images = sorted(by_image)
    for split, chosen in (
        ("validation", images[:HELD_OUT_IMAGES]),
        ("train", images[HELD_OUT_IMAGES:]),
    ):
        captions = ((i, caption(by_image[i])) for i in chosen)
        samples = (_sample("<image>", said, image_path("train", i)) for i, said in captions if said)
        write_jsonl(samples, folder / f"captions-{split}.jsonl")
        questions = (question_sample(question, "train") for i in chosen for question in by_image[i])
        write_jsonl(questions, folder / f"questions-{split}.jsonl")


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
