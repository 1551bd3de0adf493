"""Run in every rank: waits for the first rank, and for all, for longer than collectives may take."""

import datetime
import time

import pytest
import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.checkpoint.saver import by_first
from megatron_vita.errors import SaveError

LIMIT = 1.0


def main() -> None:
    """Wait for more than twice the limit, and hear of an error of the first rank."""
    platform.initialize_process()
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=LIMIT), dist.group.WORLD)
    by_first(lambda: time.sleep(2 * LIMIT))
    time.sleep(2 * LIMIT * dist.get_rank())
    platform.store_barrier()
    assert platform.broadcast_from_first(f"rank {dist.get_rank()}") == "rank 0"

    def fail() -> None:
        raise OSError("No space left on device")

    with pytest.raises(SaveError, match=r"^No space left on device$"):
        by_first(fail)

    def be_wrong() -> None:
        raise ValueError("not foreseen")

    # The others hear of it, too.
    with pytest.raises((ValueError, SaveError), match=r"^not foreseen$"):
        by_first(be_wrong)
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
