"""Tables for terminals."""

from collections.abc import Iterator, Sequence


def align(rows: Sequence[Sequence[str]], *, words_last: bool = False) -> Iterator[str]:
    """Yield the lines of a table with right-aligned columns; with `words_last` the last one
    left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if words_last:
        widths[-1] = 0
    for row in rows:
        cells = [value.rjust(width) for value, width in zip(row, widths, strict=True)]
        yield "  " + " | ".join(cells)
