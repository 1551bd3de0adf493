"""The demo's data and grades are what they are said to be."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from examples.easy_vqa.__main__ import write_result
from examples.easy_vqa.grade import Graded, accuracy, answer_all, answer_blindly, swap_images
from examples.easy_vqa.prepare import (
    DATASETS,
    Question,
    caption,
    dataset_of,
    divide_training_split,
    prepare,
    read_questions,
    usual_answers,
)
from megatron_vita.inference.requests.prompt import Prompt
from megatron_vita.inference.requests.types import CompletionOutput
from tests.environment import ROOT
from tests.forked import run_program


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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(folder)
    return folder


def test_training_data_is_the_published_training_split_alone(prepared: Path) -> None:
    rows = [
        json.loads(line)
        for path in prepared.glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    questions = [row for row in rows if "\n" in row["messages"][0]["content"]]
    assert len(questions) == len(read_questions("train")) == 38_575
    assert all(row["images"][0].startswith("train/images/") for row in rows)
    train, held_out = (
        {json.loads(line)["images"][0] for kind in ("captions", *DATASETS)
         for line in (prepared / f"{kind}-{split}.jsonl").read_text().splitlines()}
        for split in ("train", "validation")
    )  # fmt: skip
    assert len(held_out) == 100
    assert not train & held_out


def test_prepared_samples_are_what_shards_are_made_of(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "media").symlink_to((prepared / "media").resolve())
    for path in prepared.glob("*.jsonl"):
        first = path.read_text().splitlines(keepends=True)[:3]
        (tmp_path / path.name).write_text("".join(first))
    recipe = (ROOT / "examples" / "easy_vqa" / "stage2.yaml").read_text()
    (tmp_path / "stage2.yaml").write_text(
        recipe.replace("runs/demo/jsonl", str(tmp_path)).replace("runs/demo", str(tmp_path))
    )
    shard = ["shard", str(tmp_path / "stage2.yaml"), "--strict", "--workers", "0"]
    done = run_program("-m", "data_tools", *shard, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name in DATASETS:
        for split in ("train", "validation"):
            assert f"{name}-{split}: 3 samples" in done.stdout


def test_a_yes_no_question_is_unusual_if_most_answers_to_its_words_are_others() -> None:
    red = Question("is there a red shape?", "no", 1)
    questions = [red, red, Question(red.text, "yes", 2), Question("what color is it?", "red", 3)]
    usual = usual_answers(questions)
    assert [dataset_of(q, usual) for q in questions] == ["usual", "usual", "unusual", "open"]


def test_validation_asks_about_held_out_images_of_the_training_split() -> None:
    train, validation = divide_training_split()
    assert len(train) + len(validation) == 38_575
    assert len({question.image for question in validation}) == 100
    assert not {question.image for question in train} & {q.image for q in validation}


def test_figures_are_written_as_json_with_seed_and_part(tmp_path: Path) -> None:
    figures = {"model": {"all": 0.5, "color": 1.0}}
    write_result(tmp_path / "result.json", figures, part="test", seed=3, seconds=90.0)
    assert json.loads((tmp_path / "result.json").read_text()) == {
        "part": "test",
        "seed": 3,
        "minutes": 1.5,
        "accuracy": figures,
    }


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
