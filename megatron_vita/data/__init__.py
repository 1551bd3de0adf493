"""Data pipeline from shards to a `Batch`: shard files, index, pack plan, documents, stream.

It does not depend on models.
"""

from typing import TYPE_CHECKING

from megatron_vita.lazy import imported_lazily

if TYPE_CHECKING:
    from megatron_vita.data.batch import Batch
    from megatron_vita.data.loading.loader import read_packs
    from megatron_vita.data.loading.open import open_split
    from megatron_vita.data.loading.stream import PackStream
    from megatron_vita.data.planning.plan import PackPlan, read_plan
    from megatron_vita.data.planning.stamp import plan_stamp

__all__ = ["Batch", "PackPlan", "PackStream", "open_split", "plan_stamp", "read_packs", "read_plan"]

_MODULES = {
    "Batch": "batch",
    "PackPlan": "planning.plan",
    "PackStream": "loading.stream",
    "open_split": "loading.open",
    "plan_stamp": "planning.stamp",
    "read_packs": "loading.loader",
    "read_plan": "planning.plan",
}
# Commands that read no pixels need not wait for torch.
__getattr__ = imported_lazily(__name__, _MODULES)
