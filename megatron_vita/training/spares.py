"""Ranks of an elastic job that make no whole replica: they wait until the job's ranks change.

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
    """Tell whether this rank trains; the process group that it will join has only those that do.

    Returns for a spare once the others are done.

    Raises:
        ConfigError: the ranks do not make one replica.
        PlatformError: the others are gone before they were done.
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
    """Let the spares end with the block, however it does."""
    try:
        yield
    finally:
        if recipe.parallel.elastic and os.environ.get("RANK") == "0":
            platform.set_key(DONE)
