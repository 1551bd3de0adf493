"""The pack plan: which documents share a pack, in which global order. Made before training, read by every rank.

A plan is one Parquet file with a row for each document, sorted by pack, and a stamp: every input that it is a function
of. The parallel layout, the number of workers and the place of the files are not among them.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_vita.errors import DataError

FORMAT_VERSION = 1
COLUMNS = ("pack", "dataset", "shard", "row", "tokens", "tiles")
REMEDY = "make the plan again: python -m data_tools plan RECIPE"


class DocumentEntry(NamedTuple):
    """A document of a pack: `dataset` of the recipe, `shard` of the dataset's sorted shards, `row` of its index."""

    dataset: int
    shard: int
    row: int
    tokens: int
    tiles: int


class PackPlan:
    """Packs as columns: `columns[name]` has an int32 for each document, sorted by pack."""

    def __init__(self, columns: dict[str, np.ndarray], *, stamp: dict[str, Any]) -> None:
        self.columns = {name: np.asarray(columns[name], dtype=np.int32) for name in COLUMNS}
        self.stamp = stamp
        pack = self.columns["pack"]
        self.num_packs = int(pack[-1]) + 1 if len(pack) else 0
        self._starts = np.searchsorted(pack, np.arange(self.num_packs + 1))
        self._tiles = np.concatenate([[0], np.cumsum(self.columns["tiles"], dtype=np.int64)])

    @property
    def num_documents(self) -> int:
        """Documents of all packs."""
        return len(self.columns["pack"])

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, padding not counted."""
        return int(self.columns["tokens"].sum(dtype=np.int64))

    def pack(self, pack_id: int) -> list[DocumentEntry]:
        """The documents of a pack, in order. IndexError past the last pack."""
        rows = self._rows(pack_id)
        values = (self.columns[name][rows].tolist() for name in COLUMNS[1:])
        return [DocumentEntry(*entry) for entry in zip(*values, strict=True)]

    def lengths_of(self, pack_id: int) -> np.ndarray:
        """Tokens of a pack's documents: [D] int32."""
        return self.columns["tokens"][self._rows(pack_id)]

    def tiles_of(self, pack_id: int) -> int:
        """Tiles and frames of a pack."""
        rows = self._rows(pack_id)
        return int(self._tiles[rows.stop] - self._tiles[rows.start])

    def _rows(self, pack_id: int) -> slice:
        if not 0 <= pack_id < self.num_packs:
            raise IndexError(f"pack {pack_id} of a plan of {self.num_packs} packs")
        return slice(int(self._starts[pack_id]), int(self._starts[pack_id + 1]))


def write_plan(plan: PackPlan, path: Path) -> None:
    """Writes a plan under a temporary name, then renames it. Same plan, same bytes (of one pyarrow version)."""
    metadata = {"stamp": json.dumps(plan.stamp, sort_keys=True)}
    table = pa.table(plan.columns).replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial)
    os.replace(partial, path)


def read_plan(path: Path, expected_stamp: dict[str, Any] | None = None) -> PackPlan:
    """Reads a plan. DataError if it is missing, or of other inputs than `expected_stamp`, naming field and values."""
    if not path.exists():
        raise DataError(f"{path}: there is no plan; {REMEDY}")
    try:
        table = pq.read_table(path, use_threads=False, memory_map=False)
        stamp = json.loads(table.schema.metadata[b"stamp"])
        plan = PackPlan({name: table[name].to_numpy() for name in COLUMNS}, stamp=stamp)
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a pack plan: {error}; {REMEDY}") from error
    if expected_stamp is not None and (differences := list(compare_stamps(stamp, expected_stamp))):
        raise DataError(f"{path}: the plan does not fit the recipe: {'; '.join(differences[:3])}; {REMEDY}")
    return plan


def compare_stamps(planned: Any, wanted: Any, field: str = "") -> Iterator[str]:
    """A phrase for each field that differs between a plan's stamp and the one that the recipe gives now."""
    if isinstance(planned, dict) and isinstance(wanted, dict):
        for name in sorted(planned.keys() | wanted.keys()):
            inner = f"{field}.{name}" if field else name
            yield from compare_stamps(planned.get(name, "absent"), wanted.get(name, "absent"), inner)
    elif isinstance(planned, list) and isinstance(wanted, list) and len(planned) == len(wanted):
        for i, pair in enumerate(zip(planned, wanted, strict=True)):
            yield from compare_stamps(*pair, f"{field}[{i}]")
    elif isinstance(planned, list) and isinstance(wanted, list):
        yield f"{field} has {len(planned)} entries in the plan and {len(wanted)} now"
    elif planned != wanted:
        yield f"{field} is {planned} in the plan and {wanted} now"
