"""Rectangles that make up a range of a flattened tensor.

A distributed optimizer gives each rank a range of the flattened parameters; checkpoints hold
tensors in their shapes, of which any rectangle can be written and read by itself.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rectangle:
    """A part of a tensor whose elements are consecutive in it.

    start: place of the first element in the flattened tensor.
    offsets: place of the first element, axis by axis.
    sizes: shape of the part, with all axes of the tensor.
    """

    start: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def stop(self) -> int:
        """Place after the last element in the flattened tensor."""
        return self.start + math.prod(self.sizes)


def cover(shape: tuple[int, ...], start: int, stop: int, *, most: int) -> Iterator[Rectangle]:
    """Yield rectangles of a tensor of `shape` that make up elements `start` to `stop`, in order.

    Args:
        shape: of the tensor.
        start: first element, in the flattened tensor.
        stop: after the last element.
        most: elements of a rectangle.
    """
    if start >= stop:
        return
    if not shape:
        yield Rectangle(start=0, offsets=(), sizes=())
        return
    row = math.prod(shape[1:])
    # Where a row is too large, or begins before the range, or ends after it: a part of that row.
    first_whole = -(-start // row)
    after_whole = stop // row
    if row > most or first_whole >= after_whole:
        for index in range(start // row, -(-stop // row)):
            inside = max(start - index * row, 0), min(stop - index * row, row)
            yield from _of_row(shape, index, *inside, most=most)
        return
    yield from cover(shape, start, first_whole * row, most=most)
    step = most // row
    for index in range(first_whole, after_whole, step):
        rows = min(step, after_whole - index)
        yield Rectangle(
            start=index * row, offsets=(index, *(0 for _ in shape[1:])), sizes=(rows, *shape[1:])
        )
    yield from cover(shape, after_whole * row, stop, most=most)


def _of_row(
    shape: tuple[int, ...], index: int, start: int, stop: int, *, most: int
) -> Iterator[Rectangle]:
    """Yield rectangles of elements `start` to `stop` of row `index`."""
    row = math.prod(shape[1:])
    for part in cover(shape[1:], start, stop, most=most):
        yield Rectangle(
            start=index * row + part.start,
            offsets=(index, *part.offsets),
            sizes=(1, *part.sizes),
        )
