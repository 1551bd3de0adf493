"""The demo's data and grades are what they are said to be."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from examples.easy_vqa.__main__ import shard_command
from examples.easy_vqa.grade import Graded, accuracy, answer_all, answer_blindly, swap_images
from examples.easy_vqa.prepare import Question, caption, prepare, read_questions
from megatron_vita.inference.prompt import Prompt
from megatron_vita.inference.requests import CompletionOutput


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ([("what color is the circle?", "red")], "a red circle"),
        (
            [("what shape is present?", "triangle"), ("is there a teal shape?", "yes")],
            "a teal triangle",
        ),
        ([("is there not a circle?", "no"), ("is no blue shape present?", "no")], "a blue circle"),
        ([("is there a red shape?", "no"), ("is there not a circle?", "yes")], None),
        ([("what color is the shape?", "gray")], None),
    ],
)
def test_a_caption_says_what_questions_and_answers_tell_and_nothing_else(
    facts: list, said: str | None
) -> None:
    assert caption(Question(text, answer, 0) for text, answer in facts) == said


def test_training_data_is_the_published_training_split_alone(tmp_path: Path) -> None:
    prepare(tmp_path)
    rows = [
        json.loads(line)
        for path in tmp_path.glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    questions = [row for row in rows if "\n" in row["messages"][0]["content"]]
    assert len(questions) == len(read_questions("train")) == 38_575
    assert all(row["images"][0].startswith("train/images/") for row in rows)
    train, held_out = (
        {json.loads(line)["images"][0] for kind in ("captions", "questions")
         for line in (tmp_path / f"{kind}-{split}.jsonl").read_text().splitlines()}
        for split in ("train", "validation")
    )  # fmt: skip
    assert len(held_out) == 100
    assert not train & held_out


def test_prepared_samples_are_what_shards_are_made_of(tmp_path: Path) -> None:
    prepare(tmp_path)
    for kind in ("captions-train", "questions-validation"):
        source = tmp_path / f"few-{kind}.jsonl"
        source.write_text(
            "".join((tmp_path / f"{kind}.jsonl").read_text().splitlines(keepends=True)[:3])
        )
        done = subprocess.run(
            [sys.executable, *shard_command(source, tmp_path / kind)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "3 samples" in done.stdout


def test_blind_baselines_are_those_of_the_published_split() -> None:
    majority, lookup = (
        accuracy(g) for g in answer_blindly(read_questions("test"), read_questions("train"))
    )
    assert majority["all"] == pytest.approx(0.373, abs=5e-4)
    assert lookup["all"] == pytest.approx(0.670, abs=5e-4)
    assert lookup["color"] == pytest.approx(0.120, abs=5e-4)


def test_swapping_gives_every_question_the_image_of_another() -> None:
    swapped = swap_images(read_questions("test"))
    assert sorted(swapped) == sorted(swapped.values())
    assert all(image != other for image, other in swapped.items())


def test_accuracy_counts_all_and_each_kind() -> None:
    rows = [
        Graded("", 0, "color", "red", "red"),
        Graded("", 0, "color", "red", "blue"),
        Graded("", 0, "shape", "a", "a"),
    ]
    assert accuracy(rows) == {"all": pytest.approx(2 / 3), "color": 0.5, "shape": 1.0}


def test_answering_goes_on_where_it_was_cut_short(tmp_path: Path) -> None:
    questions = read_questions("test")[:200]
    asked: list = []

    class Parrot:
        def generate(
            self, prompts: Sequence[Prompt], *, sampling: object
        ) -> list[CompletionOutput]:
            asked.extend(prompts)
            return [CompletionOutput(text="yes", token_ids=[], finish="stop") for _ in prompts]

    path = tmp_path / "answers.jsonl"
    options: dict[str, Any] = {"path": path, "shown": int, "title": ""}
    whole = answer_all(Parrot(), questions, **options)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:50]) + lines[50][:7])
    asked.clear()
    assert answer_all(Parrot(), questions, **options) == whole
    assert len(asked) == 150
