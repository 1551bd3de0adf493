"""Sizes and counts as people read them."""

import pytest

from megatron_vita.sizes import counted, readable_bytes


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (1_340_000, "1.3 MB"),
        (9_960_000, "10 MB"),
        (999_600_000, "1.0 GB"),
        (28_400_000_000, "28 GB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_bytes_have_two_digits_and_a_unit(size: int, text: str) -> None:
    assert readable_bytes(size) == text


def test_one_of_a_thing_is_no_plural() -> None:
    assert [counted(n, "sample") for n in (0, 1, 2000)] == [
        "0 samples",
        "1 sample",
        "2,000 samples",
    ]
    assert [counted(n, "index", "indexes") for n in (1, 2)] == ["1 index", "2 indexes"]
