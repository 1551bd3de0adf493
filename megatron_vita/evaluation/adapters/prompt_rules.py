"""Prompts of Long-VITA's published scores: order of messages and wording by benchmark.

Source: `vlmeval/vlm/long_vita.py` of VLMEvalKit. Scores are comparable only with the same wording,
spaces included.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

MAX_NEW_TOKENS = 1024
FRAMES_ARE_VIDEOS = "Video-MME"
"""Benchmark whose frames arrive as images; Long-VITA got each of them as a video of one frame."""

_SELECT = "Please select the correct answer from the options above."
_PHRASE = "Answer the question using a single word or phrase."


@dataclass(frozen=True)
class Part:
    """A text, or an image or video in the harness's own form."""

    kind: Literal["text", "image", "video"]
    value: Any


@dataclass(frozen=True)
class PromptRule:
    """Words of the harness to remove, whether to strip the prompt, and words to append."""

    removed: str = ""
    strips: bool = False
    added: str = ""


_BY_BENCHMARK = {
    "OCRBench": PromptRule(
        added="\nAnswer this question using the text in the image directly without any other context."
    ),
    **dict.fromkeys(
        ("MMMU_DEV_VAL", "MMMU_TEST", "MMStar"),
        PromptRule(
            _SELECT, True, "\nAnswer with the option's letter from the given choices directly."
        ),
    ),
    "MVBench": PromptRule(
        "Only give the best option.Best option:(", False, "Answer with the letter."
    ),
    "MMVet": PromptRule(),
    "MathVista_MINI": PromptRule(added=f"\n{_PHRASE}"),
}
_BY_KIND = {
    "Y/N": PromptRule("Answer the question with Yes or No.", True, "\nAnswer yes or no."),
    "MCQ": PromptRule(_SELECT, True, "\nAnswer with the letter."),
    "VQA": PromptRule(),
    "Video-MCQ": PromptRule(added="Offer a very short reply."),
}
_OTHERS = PromptRule(_PHRASE, True, f"\n{_PHRASE}")


def rule_of(benchmark: str | None, kind: str | None) -> PromptRule:
    """Return the rule of a benchmark by VLMEvalKit's name, or of its kind (Y/N, MCQ, VQA,
    Video-MCQ).

    Any other kind has a rule of its own.
    """
    return _BY_BENCHMARK.get(benchmark or "") or _BY_KIND.get(kind or "") or _OTHERS


def long_vita_parts(
    parts: Iterable[Part], *, benchmark: str | None, kind: str | None
) -> list[Part]:
    """Return a prompt in Long-VITA's form: a newline after each image, and the rule's wording.

    Adjacent texts are joined, none is empty.
    """
    rule = rule_of(benchmark, kind)
    shown = [part for original in parts for part in _shown(original, benchmark)]
    # With empty texts at both ends, stripping and appending need no cases for prompts that begin or
    # end with media.
    cleaned = [
        _replaced(part, rule) for part in _joined([Part("text", ""), *shown, Part("text", "")])
    ]
    if rule.strips:
        cleaned[0] = Part("text", cleaned[0].value.lstrip())
        cleaned[-1] = Part("text", cleaned[-1].value.rstrip())
    cleaned[-1] = Part("text", cleaned[-1].value + rule.added)
    return [part for part in cleaned if part != Part("text", "")]


def clean_answer(text: str) -> str:
    """Strip a leading "Answer:" from an answer."""
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


def _replaced(part: Part, rule: PromptRule) -> Part:
    if part.kind != "text":
        return part
    text = part.value.replace("\nAnswer: ", "\n")
    if rule.removed:
        text = text.replace(rule.removed, "")
    return Part("text", text)
