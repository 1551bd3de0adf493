"""Data pipeline from shards to a `Batch`: shard files, index, pack plan, documents, stream.

It does not depend on models.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_vita.data.batch import Batch
    from megatron_vita.data.datasets import open_split, plan_stamp
    from megatron_vita.data.loading.loader import read_packs
    from megatron_vita.data.loading.stream import PackStream
    from megatron_vita.data.planning.plan import PackPlan, read_plan

__all__ = ["Batch", "PackPlan", "PackStream", "open_split", "plan_stamp", "read_packs", "read_plan"]

_MODULES = {
    "Batch": "batch",
    "PackPlan": "planning.plan",
    "PackStream": "loading.stream",
    "open_split": "datasets",
    "plan_stamp": "datasets",
    "read_packs": "loading.loader",
    "read_plan": "planning.plan",
}


def __getattr__(name: str) -> object:
    """Import a name at its first use: commands that read no pixels need not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return getattr(module, name)
