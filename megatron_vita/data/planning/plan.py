"""Pack plan: the documents of each pack, in global order; made before training, read by every rank.

A plan is one Arrow file with a row for each document, sorted by pack, and a stamp: every input of
the plan. Parallel layout, number of workers and location of the files are not among them. The file
is memory-mapped, so that all processes of a host share one copy.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from megatron_vita.errors import DataError, ShardError
from megatron_vita.files import atomic_write

FORMAT_VERSION = 3
COLUMNS = ("pack", "dataset", "shard", "row", "start", "tokens", "tiles", "rows")
# Columns that a continued plan keeps unchanged; numbers of datasets and shards may change.
LASTING = ("pack", "row", "start", "tokens", "tiles", "rows")
HASHED_AT_ONCE = 1 << 20  # documents
REMEDY = "make the plan again: vita data plan RECIPE"


class DocumentEntry(NamedTuple):
    """A document of a pack: `dataset` of the plan, `shard` of the sorted dataset, `row` of its
    index.

    Its `tokens` begin at token `start` of the sample; `loss_tokens` of them carry loss.
    """

    dataset: int
    shard: int
    row: int
    start: int
    tokens: int
    tiles: int
    loss_tokens: int


class PackPlan:
    """Packs as columns of int32 with a value for each document, sorted by pack.

    `datasets` are names. `history` describes each earlier plan that this one continues: {"packs":
    number of packs from it, "stamp": its stamp}.
    """

    def __init__(
        self,
        columns: dict[str, np.ndarray],
        *,
        datasets: Sequence[str] = (),
        stamp: dict[str, Any],
        history: Sequence[dict[str, Any]] = (),
        path: Path | None = None,
    ) -> None:
        self.columns = {name: np.asarray(columns[name], dtype=np.int32) for name in COLUMNS}
        self.datasets = list(datasets)
        self.stamp = stamp
        self.history = list(history)
        self._path = path
        self._hashed = 0
        self._hash = hashlib.blake2b(digest_size=16)
        pack = self.columns["pack"]
        self.num_packs = 0
        if len(pack):
            self.num_packs = int(pack[-1]) + 1
            self._starts = np.concatenate([[0], np.flatnonzero(np.diff(pack)) + 1, [len(pack)]])
        else:
            self._starts = np.zeros(1, np.int64)
        assert len(self._starts) == self.num_packs + 1, "every pack has a document"

    @property
    def num_documents(self) -> int:
        """Number of documents in all packs."""
        return len(self.columns["pack"])

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents, without padding."""
        return int(self.columns["tokens"].sum(dtype=np.int64))

    def pack(self, pack_id: int) -> list[DocumentEntry]:
        """List the documents of a pack, in order; raises IndexError past the last pack."""
        rows = self._rows(pack_id)
        values = (self.columns[name][rows].tolist() for name in COLUMNS[1:])
        return [DocumentEntry(*entry) for entry in zip(*values, strict=True)]

    def lengths_of(self, pack_id: int) -> np.ndarray:
        """Lengths of a pack's documents in tokens: int32 [D]."""
        return self.columns["tokens"][self._rows(pack_id)]

    def tiles_of(self, pack_id: int) -> int:
        """Number of tiles and frames of a pack."""
        return int(self.columns["tiles"][self._rows(pack_id)].sum(dtype=np.int64))

    def documents_before(self, pack_id: int) -> int:
        """Number of documents in the packs before `pack_id`."""
        return int(self._starts[pack_id])

    def digest_before(self, pack_id: int) -> str:
        """Digest of the packs before `pack_id`, to recognize them in another plan.

        It does not depend on the numbers of datasets and shards, which a continued plan may change.
        """
        # Saving asks with ascending packs: the hash continues from the last one.
        rows = self.documents_before(pack_id)
        if rows < self._hashed:
            self._hashed = 0
            self._hash = hashlib.blake2b(digest_size=16)
        # In blocks: all columns stacked at once would need the memory of the plan again.
        for start in range(self._hashed, rows, HASHED_AT_ONCE):
            block = slice(start, min(start + HASHED_AT_ONCE, rows))
            self._hash.update(
                np.stack([self.columns[name][block] for name in LASTING], axis=1).tobytes()
            )
        self._hashed = rows
        return self._hash.hexdigest()

    def before(self, pack_id: int) -> dict[str, np.ndarray]:
        """Columns of the packs before `pack_id`."""
        return {name: column[: int(self._starts[pack_id])] for name, column in self.columns.items()}

    def _rows(self, pack_id: int) -> slice:
        if not 0 <= pack_id < self.num_packs:
            raise IndexError(f"pack {pack_id} of a plan of {self.num_packs} packs")
        return slice(int(self._starts[pack_id]), int(self._starts[pack_id + 1]))

    def _fingerprint(self) -> str:
        """Digest of the plan's inputs."""
        about = json.dumps(
            [self.datasets, self.stamp, self.history, self.num_documents], sort_keys=True
        )
        return hashlib.sha256(about.encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a plan from a file as its path, so that other processes map the same file."""
        if self._path is not None:
            return _reopen, (self._path, self._fingerprint())
        return _rebuild, (self.columns, self.datasets, self.stamp, self.history)


def _reopen(path: Path, fingerprint: str) -> PackPlan:
    """Open the plan of a run in another of its processes."""
    try:
        plan = read_plan(path)
    except DataError as error:
        raise ShardError(f"{error} (the plan was replaced while a run has it open)") from error
    if plan._fingerprint() != fingerprint:
        raise ShardError(
            f"{path}: the plan was replaced by another while a run has it open: end the run and "
            "resume it, which checks the plan against what was consumed"
        )
    return plan


def _rebuild(
    columns: dict[str, np.ndarray],
    datasets: list[str],
    stamp: dict[str, Any],
    history: list[dict[str, Any]],
) -> PackPlan:
    return PackPlan(columns, datasets=datasets, stamp=stamp, history=history)


def write_plan(plan: PackPlan, path: Path) -> None:
    """Write a plan atomically. Equal plans give equal bytes (with one version of pyarrow)."""
    about = {
        "format_version": FORMAT_VERSION,
        "datasets": plan.datasets,
        "stamp": plan.stamp,
        "history": plan.history,
    }
    table = pa.table(plan.columns).replace_schema_metadata(
        {"plan": json.dumps(about, sort_keys=True)}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_write(path) as partial,
        pa.OSFile(str(partial), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        # One chunk a column, so that a reader maps each as one array.
        writer.write_table(table, max_chunksize=max(len(table), 1))


def read_plan(path: Path, expected_stamp: dict[str, Any] | None = None) -> PackPlan:
    """Memory-map a plan.

    Args:
        path: the plan file.
        expected_stamp: inputs that the plan must have been made of; None: any.

    Raises:
        DataError: the plan is missing, damaged, or made of other inputs; names field and values.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no plan; {REMEDY}")
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        about = json.loads(table.schema.metadata[b"plan"])
        version = about["format_version"]
        if version == FORMAT_VERSION:
            columns = {name: table[name].combine_chunks().to_numpy() for name in COLUMNS}
        else:
            columns = {}
    except (pa.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
        raise DataError(f"{path}: not a pack plan: {error}; {REMEDY}") from error
    # After the parsing, so that a damaged file is not reported as one of another format.
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: plan format {version}, this version reads {FORMAT_VERSION}; {REMEDY}"
        )
    plan = PackPlan(
        columns,
        datasets=about["datasets"],
        stamp=about["stamp"],
        history=about["history"],
        path=path,
    )
    if expected_stamp is not None and (
        differences := list(compare_stamps(plan.stamp, expected_stamp))
    ):
        raise DataError(
            f"{path}: the plan does not fit the recipe: {'; '.join(differences[:3])}; {REMEDY}"
        )
    return plan


def compare_stamps(planned: Any, wanted: Any, field: str = "") -> Iterator[str]:
    """Yield a phrase for each field that differs between a plan's stamp and the recipe's."""
    if isinstance(planned, dict) and isinstance(wanted, dict):
        for name in sorted(planned.keys() | wanted.keys()):
            inner = name
            if field:
                inner = f"{field}.{name}"
            yield from compare_stamps(
                planned.get(name, "absent"), wanted.get(name, "absent"), inner
            )
    elif isinstance(planned, list) and isinstance(wanted, list) and len(planned) == len(wanted):
        for i, pair in enumerate(zip(planned, wanted, strict=True)):
            yield from compare_stamps(*pair, f"{field}[{i}]")
    elif isinstance(planned, list) and isinstance(wanted, list):
        yield f"{field} has {len(planned)} entries in the plan and {len(wanted)} now"
    elif planned != wanted:
        yield f"{field} is {planned} in the plan and {wanted} now"
