"""Spare ranks of an elastic job, beyond the last whole replica: they wait until its ranks change.

torchrun starts all ranks again when one is lost or another machine joins. Until then a spare must
neither end, since its machine would leave the job, nor join the process group.
"""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator

from megatron_vita import platform
from megatron_vita.config import Recipe

DONE = "megatron_vita/trained"
logger = logging.getLogger(__name__)


def take_part(recipe: Recipe) -> bool:
    """Return true if this rank trains, and set up its process group without the spares.

    A spare waits here until the others are done, and returns false.

    Raises:
        ConfigError: the ranks do not make one replica.
        PlatformError: the others have gone before they were done.
    """
    if not recipe.parallel.elastic or "RANK" not in os.environ:
        return True
    ranks = int(os.environ["WORLD_SIZE"])
    used = recipe.ranks_in_use(ranks)
    rank = int(os.environ["RANK"])
    if rank < used:
        first = rank - int(os.environ["LOCAL_RANK"])  # of this host
        local = min(int(os.environ["LOCAL_WORLD_SIZE"]), used - first)
        os.environ |= {"WORLD_SIZE": str(used), "LOCAL_WORLD_SIZE": str(local)}
        return True
    logger.warning("rank %d is a spare: %d of %d ranks train; it waits for them", rank, used, ranks)
    # A request to save and stop is for those that train, who let the spares end.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    platform.wait_for_key(DONE)
    return False


@contextlib.contextmanager
def spares_end(recipe: Recipe) -> Iterator[None]:
    """Let the spares end when the block ends, also by an error."""
    try:
        yield
    finally:
        if recipe.parallel.elastic and os.environ.get("RANK") == "0":
            platform.set_key(DONE)
