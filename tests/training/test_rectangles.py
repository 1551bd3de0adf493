"""Rectangles make up any range of a flattened tensor, in order, and none is too large."""

import math

import numpy as np
import pytest

from megatron_vita.checkpoint.rectangles import cover


@pytest.mark.parametrize("seed", range(5))
def test_rectangles_make_up_any_range_in_order(seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(200):
        shape = tuple(int(size) for size in random.integers(1, 7, random.integers(1, 5)))
        count = math.prod(shape)
        start, stop = sorted(int(place) for place in random.integers(0, count + 1, 2))
        most = int(random.integers(1, 30))
        elements = np.arange(count).reshape(shape)
        found: list[int] = []
        for part in cover(shape, start, stop, most=most):
            assert part.start == start + len(found)
            where = tuple(
                slice(offset, offset + size)
                for offset, size in zip(part.offsets, part.sizes, strict=True)
            )
            assert elements[where].size == math.prod(part.sizes) <= most
            found += elements[where].ravel().tolist()
        assert found == list(range(start, stop))


def test_whole_rows_are_taken_together() -> None:
    parts = list(cover((10, 4), 2, 38, most=16))
    assert [(part.offsets, part.sizes) for part in parts] == [
        ((0, 2), (1, 2)),
        ((1, 0), (4, 4)),
        ((5, 0), (4, 4)),
        ((9, 0), (1, 2)),
    ]


def test_a_tensor_without_axes_is_one_element() -> None:
    (part,) = cover((), 0, 1, most=10)
    assert (part.offsets, part.sizes) == ((), ())
