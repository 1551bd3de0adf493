"""From shards to a `Batch`: shard files, their index, the pack plan, documents, the stream. Knows
nothing of models."""

from megatron_vita.data.batch import Batch
from megatron_vita.data.datasets import open_split, plan_stamp
from megatron_vita.data.loading.loader import read_packs
from megatron_vita.data.loading.stream import PackStream
from megatron_vita.data.planning.plan import PackPlan, read_plan

__all__ = ["Batch", "PackPlan", "PackStream", "open_split", "plan_stamp", "read_packs", "read_plan"]
