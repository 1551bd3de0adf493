"""A job that reads packs and saves its position now and then, as training does. Arguments: world
(pickled), folder.

`read.log` has a line for each pack read: its number and a digest of its batch; `position` is
written with the log's length, so that a job that goes on drops what it will read again.
"""

import hashlib
import os
import pickle
import sys
from pathlib import Path

from megatron_vita.data.batch import Batch
from megatron_vita.data.loading.loader import read_packs
from megatron_vita.data.loading.worker import PackTask
from tests.data.toy_data import train_stream

EVERY = 3


def digest(batch: Batch) -> str:
    """Digest of all tensors of a batch."""
    found = hashlib.sha256()
    for tensor in (
        batch.input_ids,
        batch.labels,
        batch.cu_seqlens,
        batch.tiles,
        batch.tile_ids,
        batch.placements,
    ):
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def main() -> None:
    """Read the plan's packs over and over, up to number `LAST`, from the saved position on."""
    world = pickle.loads(Path(sys.argv[1]).read_bytes())
    folder = Path(sys.argv[2])
    last = int(sys.argv[3])
    stream = train_stream(world, (1, 2))
    position = folder / "position"
    consumed, length = map(int, position.read_text().split()) if position.exists() else (0, 0)
    with open(folder / "read.log", "a") as log:
        log.truncate(length)
        tasks = (PackTask(i % len(stream)) for i in range(consumed, last))
        for i, pack in enumerate(
            read_packs(stream, tasks, num_workers=2, prefetch=3), start=consumed
        ):
            log.write(f"{i} {pack.batch.pack_id} {digest(pack.batch)}\n")
            log.flush()
            if i % EVERY == EVERY - 1 or i == last - 1:
                position.with_suffix(".new").write_text(f"{i + 1} {log.tell()}")
                os.replace(position.with_suffix(".new"), position)


if __name__ == "__main__":
    main()
