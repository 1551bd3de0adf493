"""Rows of the harness: a kind of fault, and how often it was tried, survived and lost."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(kw_only=True)
class Row:
    """A kind of fault.

    survived: times that the rule for the kind held.
    lost: times that it did not.
    rule: what must hold.
    seconds: mean time from the fault to its report; None where there is none.
    """

    kind: str
    rule: str
    tried: int = 0
    survived: int = 0
    lost: int = 0
    seconds: float | None = None

    def count(self, survived: bool) -> None:
        """Count one more try."""
        self.tried += 1
        if survived:
            self.survived += 1
        else:
            self.lost += 1


def as_table(rows: Iterable[Row]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield "| fault | tried | survived | lost |"
    yield "|---|---|---|---|"
    for row in rows:
        yield f"| {row.kind} | {row.tried} | {row.survived} | {row.lost} |"


def write_rows(rows: Iterable[Row], path: Path, *, about: dict[str, Any]) -> None:
    """Write the rows as JSON, with what they were measured on."""
    whole = {**about, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(whole, indent=1) + "\n")
