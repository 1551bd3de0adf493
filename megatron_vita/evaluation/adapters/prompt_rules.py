"""How Long-VITA's published scores were asked for: its VLMEvalKit model's order of messages and
words by benchmark.

Source: `vlmeval/vlm/long_vita.py` of VLMEvalKit. Scores are comparable only with the same words,
spaces included.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

MAX_NEW_TOKENS = 1024
FRAMES_ARE_VIDEOS = "Video-MME"
"""The benchmark whose frames come as images, each of which is shown as a video of one frame."""

_SELECT = "Please select the correct answer from the options above."
_PHRASE = "Answer the question using a single word or phrase."


@dataclass(frozen=True)
class Part:
    """A text, or an image or video in whatever form the harness has it."""

    kind: Literal["text", "image", "video"]
    value: Any


@dataclass(frozen=True)
class Rule:
    """Words of the harness to remove, whether space around the whole is then removed, and words to
    add at the end."""

    removed: str = ""
    strips: bool = False
    added: str = ""


_BY_BENCHMARK = {
    "OCRBench": Rule(
        added="\nAnswer this question using the text in the image directly without any other context."
    ),
    **dict.fromkeys(
        ("MMMU_DEV_VAL", "MMMU_TEST", "MMStar"),
        Rule(_SELECT, True, "\nAnswer with the option's letter from the given choices directly."),
    ),
    "MVBench": Rule("Only give the best option.Best option:(", False, "Answer with the letter."),
    "MMVet": Rule(),
    "MathVista_MINI": Rule(added=f"\n{_PHRASE}"),
}
_BY_KIND = {
    "Y/N": Rule("Answer the question with Yes or No.", True, "\nAnswer yes or no."),
    "MCQ": Rule(_SELECT, True, "\nAnswer with the letter."),
    "VQA": Rule(),
    "Video-MCQ": Rule(added="Offer a very short reply."),
}
_OTHERS = Rule(_PHRASE, True, f"\n{_PHRASE}")


def rule_of(benchmark: str | None, kind: str | None) -> Rule:
    """The rule of a benchmark by VLMEvalKit's name, or else of its kind (Y/N, MCQ, VQA, Video-MCQ,
    others)."""
    return _BY_BENCHMARK.get(benchmark or "") or _BY_KIND.get(kind or "") or _OTHERS


def long_vita_parts(
    parts: Iterable[Part], *, benchmark: str | None, kind: str | None
) -> list[Part]:
    """A prompt in Long-VITA's form: a newline after each image, and the words of the benchmark's
    rule.

    Neighbouring texts are joined, none is empty.
    """
    rule = rule_of(benchmark, kind)
    told = [part for original in parts for part in _shown(original, benchmark)]
    cleaned = [
        _replaced(part, rule) for part in _joined([Part("text", ""), *told, Part("text", "")])
    ]
    if rule.strips:
        cleaned[0] = Part("text", cleaned[0].value.lstrip())
        cleaned[-1] = Part("text", cleaned[-1].value.rstrip())
    cleaned[-1] = Part("text", cleaned[-1].value + rule.added)
    return [part for part in cleaned if part != Part("text", "")]


def clean_answer(text: str) -> str:
    """An answer without the words "Answer:" before it."""
    return re.sub(r"^\s*Answer:", "", text).strip()


def _shown(part: Part, benchmark: str | None) -> list[Part]:
    if part.kind != "image":
        return [part]
    if benchmark == FRAMES_ARE_VIDEOS:
        return [Part("video", part.value)]
    return [part, Part("text", "\n")]


def _joined(parts: Iterable[Part]) -> list[Part]:
    joined: list[Part] = []
    for part in parts:
        if joined and joined[-1].kind == part.kind == "text":
            joined[-1] = Part("text", joined[-1].value + part.value)
        else:
            joined.append(part)
    return joined


def _replaced(part: Part, rule: Rule) -> Part:
    if part.kind != "text":
        return part
    text = part.value.replace("\nAnswer: ", "\n")
    return Part("text", text.replace(rule.removed, "") if rule.removed else text)
