"""Ranks of an elastic job that make no whole replica: they wait until the job's ranks change.

torchrun starts all ranks again when one is lost or another machine joins. Until then a spare must
neither end, since its machine would leave the job, nor join the process group.
"""

import logging
import os

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
    used = recipe.ranks_in_use(int(os.environ.get("WORLD_SIZE", "1")))
    rank = int(os.environ["RANK"])
    if rank < used:
        os.environ["WORLD_SIZE"] = str(used)
        return True
    logger.warning("rank %d waits: %d ranks make whole replicas of the layout", rank, used)
    platform.wait_outside(DONE)
    return False


def announce_done() -> None:
    """Let the spares end, from the first rank."""
    platform.announce(DONE)
