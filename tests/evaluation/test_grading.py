"""Grading of answers as right or wrong."""

import pytest

from megatron_vita.evaluation.grading import (
    choice_letter,
    contains,
    exact_match,
    same_digits,
    same_letter,
)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("73914", True),
        ("The access code of the red door is 73914.", True),
        ("7 3 9-1 4", True),
        ("73,914", True),
        ("\uff17\uff13\uff19\uff11\uff14", True),
        ("73915", False),
        ("739140", False),
        ("either 73914 or 73915", False),
        ("seven", False),
        ("", False),
    ],
)
def test_a_code_is_right_if_its_digits_and_no_others_are_there(answer: str, right: bool) -> None:
    assert same_digits(answer, "73914") is right


def test_a_reference_without_digits_is_never_met() -> None:
    assert not same_digits("none", "none")


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("A  red circle.", "red circle", True),
        ("the RED\ncircle", "Red Circle!", True),
        ("3.5", "35", False),
        ("don't", "dont", False),
        ("a", "a", True),
        ("a", "the", False),
        ("red circles", "red circle", False),
        ("\uff52\uff45\uff44", "red", True),
    ],
)
def test_exact_match_overlooks_case_articles_punctuation_and_spaces(
    answer: str, reference: str, right: bool
) -> None:
    assert exact_match(answer, reference) is right


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("I see a red circle here", "Red circle", True),
        ("I see scarred circles", "red circle", False),
        ("anything", "", False),
    ],
)
def test_contains_wants_the_references_words_whole_and_in_a_row(
    answer: str, reference: str, right: bool
) -> None:
    assert contains(answer, reference) is right


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. a cat", "B"),
        ("(B) a cat", "B"),
        ("Answer: B", "B"),
        ("The answer is B.", "B"),
        ("The correct option is (B), a cat", "B"),
        ("A cat sits on a mat", None),
        ("I think it is a cat", None),
        ("I think it's C", "C"),
        ("The answer is a cat", None),
        ("The answer is B because cats purr", "B"),
        ("The answer is A because cats purr", "A"),
        ("the answer is b.", "B"),
        ("The answer is A or the answer is B", None),
        ("", None),
    ],
)
def test_the_letter_of_a_choice_is_told_from_words(text: str, letter: str | None) -> None:
    assert choice_letter(text) == letter


def test_two_answers_without_a_letter_do_not_agree() -> None:
    assert not same_letter("a cat", "a cat")
    assert same_letter("(c)", "C. a dog")
