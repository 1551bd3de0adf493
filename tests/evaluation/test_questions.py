"""Held-out questions: samples, metrics, groups, restarts."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from megatron_vita.errors import ConfigError, DataError
from megatron_vita.evaluation.answering import Reply
from megatron_vita.evaluation.questions import read_questions, run_questions
from megatron_vita.evaluation.results import ResultLog
from megatron_vita.inference.requests.prompt import Prompt
from megatron_vita.inference.requests.types import SamplingParams


class Says:
    """Gives answers in this order; None is a refusal, and the end of the list stands for a kill."""

    def __init__(self, *texts: str | None) -> None:
        self.texts = list(texts)
        self.prompts: list[Prompt] = []

    def answers(self, prompts: Iterable[Prompt], *, sampling: SamplingParams) -> Iterator[Reply]:
        for prompt in prompts:
            if not self.texts:
                raise KeyboardInterrupt
            self.prompts.append(prompt)
            text = self.texts.pop(0)
            yield Reply(error="no") if text is None else Reply(text=text)


def sample(question: str, answer: str, **fields: object) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **fields}


def write(path: Path, *samples: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in samples))
    return path


def run(
    folder: Path, path: Path, answerer: Says, metric: str = "exact", group: str | None = None
) -> dict:
    questions = read_questions(path, media=path.parent, group=group)
    return run_questions(
        answerer, questions, metric=metric, folder=folder, max_new_tokens=8, settings={"model": "m"}
    )


def test_answers_are_counted_by_group_and_over_all(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        sample("color?", "red", kind="color"),
        sample("color?", "blue", kind="color"),
        sample("shape?", "circle", kind="shape"),
    )
    report = run(tmp_path / "out", path, Says("Red.", "green", "a circle"), group="kind")
    assert report["all"]["right"] == 2
    assert report["groups"]["color"] == {"right": 1, "asked": 2, "share": 0.5}
    assert report["groups"]["shape"] == {"right": 1, "asked": 1, "share": 1.0}
    assert "| color | 1 | 2 | 50.0 % |" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(("metric", "right"), [("exact", 1), ("contains", 3), ("letter", 2)])
def test_the_metric_is_the_one_named(tmp_path: Path, metric: str, right: int) -> None:
    path = write(tmp_path / "a.jsonl", *[sample("which?", "B")] * 4)
    answerer = Says("b", "it is B", "(C) a cat", "perhaps b or c")
    assert run(tmp_path / "out", path, answerer, metric)["all"]["right"] == right


def test_an_unknown_metric_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", sample("which?", "B"))
    answerer = Says()
    with pytest.raises(ConfigError, match="known: exact, contains, letter"):
        run(tmp_path / "out", path, answerer, "bleu")


def test_a_question_comes_with_earlier_turns_and_media_and_without_its_answer(
    tmp_path: Path,
) -> None:
    (tmp_path / "cat.png").write_bytes(b"a cat")
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "<image>what?"},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "color?"},
        {"role": "assistant", "content": "black"},
    ]
    path = write(tmp_path / "a.jsonl", {"messages": turns, "images": ["cat.png"]})
    answerer = Says("black")
    assert run(tmp_path / "out", path, answerer)["all"]["right"] == 1
    assert answerer.prompts[0].messages == turns[:-1]
    assert [image.data for image in answerer.prompts[0].images] == [b"a cat"]


def test_a_killed_run_asks_only_what_is_missing_or_was_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[sample(f"{n}?", str(n)) for n in range(4)])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", path, Says("0", None))
    answerer = Says("1", "2", "3")
    report = run(tmp_path / "out", path, answerer)
    assert [prompt.messages[0]["content"] for prompt in answerer.prompts] == ["1?", "2?", "3?"]
    assert (report["all"]["right"], report["refused"]) == (4, 0)


def test_an_answer_with_any_line_separator_survives_a_restart(tmp_path: Path) -> None:
    row = {"answer": "a\u2028b\u0085c\rd\ne"}
    ResultLog(tmp_path / "answers.jsonl").add("first", row)
    assert ResultLog(tmp_path / "answers.jsonl").rows == {"first": row}


def test_another_metric_grades_the_same_answers_without_asking(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", sample("which?", "B"))
    assert run(tmp_path / "out", path, Says("it is B"))["all"]["right"] == 0
    assert run(tmp_path / "out", path, Says(), "letter")["all"]["right"] == 1


def test_a_refused_question_is_wrong_whatever_its_reference(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", sample("which?", "B"))
    report = run(tmp_path / "out", path, Says(None))
    assert (report["all"]["right"], report["refused"]) == (0, 1)


def test_refused_questions_are_named_with_the_reason_by_their_place_in_the_file(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "a.jsonl", sample("which?", "B"), sample("color?", "red"))
    report = run(tmp_path / "out", path, Says("B", None))
    assert report["refused_prompts"] == [{"name": "question 2 (color?)", "error": "no"}]
    page = (tmp_path / "out" / "report.md").read_text()
    assert "1 prompt was refused; they count as wrong:\n\n* question 2 (color?): no" in page


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (sample("a?", ""), "last assistant turn is empty"),
        ({"messages": [{"role": "user", "content": "a?"}]}, "no assistant turn"),
        (
            {"messages": [*sample("a?", "b")["messages"], {"role": "user", "content": "c?"}]},
            "last its answer",
        ),
        (sample("<image>a?", "b"), "1 places for images"),
        (sample("a?", "b", color="red"), "no field kind"),
        ("text", "a sample is a JSON object"),
    ],
)
def test_a_wrong_sample_is_named_by_file_and_line(
    tmp_path: Path, line: object, message: str
) -> None:
    path = write(tmp_path / "a.jsonl", sample("a?", "b", kind="k"), line)
    group = "kind" if isinstance(line, dict) and "color" in line else None
    held_out = read_questions(path, media=tmp_path, group=group)
    assert [question.reference for question in held_out.questions] == ["b"]
    (rejected,) = held_out.rejected
    assert re.search(message, rejected)
    assert f"{path}:2: " in rejected
    report = run(tmp_path / "out", path, Says("b"), group=group)
    assert report["rejected"] == [rejected]
    assert report["all"]["asked"] == 1
    assert rejected in (tmp_path / "out" / "report.md").read_text()


def test_a_file_without_questions_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "text", sample("<image>a?", "b"))
    with pytest.raises(DataError, match=r"no questions; 2 samples are rejected, the first: .*:1: "):
        read_questions(path, media=tmp_path, group=None)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read_questions(tmp_path / "none.jsonl", media=tmp_path, group=None)
    path = write(tmp_path / "a.jsonl", sample("<image>a?", "b", images=["none.png"]))
    with pytest.raises(DataError, match=r"none\.png"):
        run(tmp_path / "out", path, Says("b"))
