"""Bounds and choices that are declared with a field are checked, named in messages and in help."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from data_tools.workers.pool import WorkerOptions
from megatron_vita.config import GenerationConfig, describe_fields
from megatron_vita.config.parsing.fields import Bounds, Form, check_fields, described, type_hints
from megatron_vita.errors import ConfigError
from megatron_vita.inference.requests.types import ADVISED, SamplingParams

WORDS: list[tuple[dict[str, Any], str]] = [
    ({"ge": 1}, "at least 1"),
    ({"gt": 0}, "positive"),
    ({"gt": 0, "lt": math.inf}, "positive and finite"),
    ({"gt": 0, "le": 1}, "above 0 and at most 1"),
    ({"ge": 0, "lt": 1}, "at least 0 and below 1"),
    ({"ge": -2, "le": 2}, "from -2 to 2"),
    ({"ge": 0, "lt": 1 << 63}, "at least 0 and below 2**63"),
    ({"ge": 1, "multiple_of": 2}, "at least 1 and a multiple of 2"),
    ({"ge": 0, "le": 8, "multiple_of": 4}, "from 0 to 8 and a multiple of 4"),
]
NAMES = {"round": 1, "flat": 2}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A field of every kind that is checked."""

    share: float = described(0.5, "A fraction.", gt=0, le=1)
    most: int | None = described(None, "A limit.", ge=1)
    kind: Literal["one", "two"] = described("one", "A choice.")
    kinds: list[Literal["one", "two"]] = described(["one"], "Several.")
    shape: str = described("round", "A name of a registry.", choices=NAMES)
    even: int = described(2, "An even number.", ge=0, multiple_of=2)
    day: str = described("", "A date.", form=Form(pattern=r"(\d\d-\d\d)?", name="MM-DD"))
    codes: list[str] = described([], "Codes.", form=Form(pattern="[A-Z]+", name="CAPITALS"))
    style: str = described("", "With one.", needs=("kind=two", "most"))
    halves: bool = described(False, "Of an even number.", needs=("even>2",))
    parts: list[str] = described(["a"], "Parts.", min_length=1)

    def __post_init__(self) -> None:
        check_fields(self, "group.")


@pytest.mark.parametrize(("bounds", "words"), WORDS)
def test_bounds_read_as_the_end_of_must_be(bounds: dict[str, Any], words: str) -> None:
    assert str(Bounds(**bounds)) == words


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A list of two."""

    ends: list[int] = described([1, 2], "Ends.", min_length=2)


def test_fewest_items_are_counted_in_words() -> None:
    with pytest.raises(ConfigError, match=r"ends is \[1\]: it must have at least 2 items$"):
        check_fields(Pair(ends=[1]), "")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 0}, "group.share is 0: it must be above 0 and at most 1"),
        ({"share": math.nan}, "group.share is nan: it must be above 0 and at most 1"),
        ({"share": "1"}, "group.share is '1': it must be above 0 and at most 1"),
        ({"most": 0}, "group.most is 0: it must be at least 1"),
        ({"most": -(10**50)}, f"group.most is -1{'0' * 38}: it must be at least 1"),
        ({"kind": "three"}, "group.kind is 'three'; known: one, two"),
        ({"kind": None}, "group.kind is None; known: one, two"),
        ({"kind": []}, "group.kind is []; known: one, two"),
        ({"kind": ["one"]}, "group.kind is ['one']; known: one, two"),
        ({"share": None}, "group.share is None: it must be above 0 and at most 1"),
        ({"kinds": ["one", "three"]}, "group.kinds is ['one', 'three']; known: one, two"),
        ({"shape": "square"}, "group.shape is 'square'; known: round, flat"),
        ({"even": 3}, "group.even is 3: it must be at least 0 and a multiple of 2"),
        ({"even": math.inf}, "group.even is inf: it must be at least 0 and a multiple of 2"),
        ({"day": "01-02\n"}, r"group.day is '01-02\n': MM-DD is needed"),
        ({"day": 12}, "group.day is 12: MM-DD is needed"),
        ({"codes": ["A", "b"]}, "group.codes holds 'b': CAPITALS is needed"),
        ({"style": "x"}, "group.style is 'x', which needs group.kind two; it is one"),
        ({"style": "x", "kind": "two"}, "group.style is 'x', which needs group.most"),
        ({"style": "x", "kind": "three"}, "group.kind is 'three'; known: one, two"),
        ({"halves": True}, "group.halves is True, which needs group.even above 2; it is 2"),
        ({"parts": []}, "group.parts is []: it must have at least 1 item"),
        ({"parts": "a"}, "group.parts is 'a': it must have at least 1 item"),
    ],
)
def test_a_value_out_of_bounds_or_choices_is_refused_in_one_line(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        Settings(**values)
    assert str(error.value) == message


def test_fields_of_a_command_line_are_refused_by_the_name_of_the_option() -> None:
    with pytest.raises(ConfigError, match=r"^--time-limit is 0\.0: it must be positive$"):
        WorkerOptions(time_limit=0.0)


def test_values_at_the_bounds_and_an_optional_none_are_right() -> None:
    Settings(share=1.0, most=1, kinds=["one", "two"])
    Settings(share=1e-9, most=None, kinds=[])
    Settings(even=0, day="12-31", codes=["A", "BC"], style="x", kind="two", most=1)
    Settings(even=4, halves=True, parts=["a"])


def test_names_added_to_a_registry_later_are_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NAMES, "square", 3)
    assert Settings(shape="square").shape == "square"


def test_help_names_choices_and_bounds() -> None:
    text = "\n".join(describe_fields(Settings))
    assert "kind: one | two = 'one'" in text
    assert "kinds: list[one | two] = ['one']" in text
    assert "shape: round | flat = 'round'" in text
    assert "most: int | null = None\n      A limit. Must be at least 1." in text
    assert "A date. Form: MM-DD." in text
    assert "With one. Needs kind two and most." in text
    assert "Of an even number. Needs even above 2." in text
    assert "Parts. Items: at least 1." in text


def test_a_recipe_may_advise_what_a_request_may_ask_for() -> None:
    asked = {field.name: field.metadata for field in dataclasses.fields(SamplingParams)}
    for field in dataclasses.fields(GenerationConfig):
        assert field.metadata["bounds"] == asked[field.name]["bounds"]
    assert set(ADVISED) <= type_hints(SamplingParams).keys()
