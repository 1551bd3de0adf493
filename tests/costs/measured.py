"""Training steps that were measured: Qwen2.5-7B's shape with InternViT-300M, everything trained, bf16,
tower recomputed, packs of `benchmarks/vision_dealing.py`, the optimizer's step included.

2 x H200, torch 2.11.0+cu130, Transformer Engine 2.20.2, megatron-core 0.19.2, commit 040bccf,
2026-11-28: before the last product of a recomputed MLP was left out. Peaks are torch's `max_memory_allocated` in GiB.
"""

from dataclasses import dataclass, field
from typing import Any

from megatron_vita.config import (
    DataConfig,
    LanguageConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    TrainingConfig,
)
from megatron_vita.costs.memory.memory import PackLoad

QWEN_7B: dict[str, Any] = {
    "num_layers": 28,
    "hidden_size": 3584,
    "ffn_hidden_size": 18944,
    "num_attention_heads": 28,
    "num_query_groups": 4,
}
FULL = {"recompute_granularity": "full"}
MLP = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CP2 = {"context_parallel_size": 2}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A case and its results."""

    name: str
    peak: float  # GiB
    seconds: float  # of a step
    length: int = 32 * 1024
    documents: int = 4
    layers: int = 28
    parallel: dict[str, Any] = field(default_factory=lambda: TP2)
    training: dict[str, Any] = field(default_factory=lambda: FULL)

    def recipe(self) -> Recipe:
        """The recipe that was run."""
        language = LanguageConfig(**QWEN_7B | {"num_layers": self.layers})
        return Recipe(
            model=ModelConfig(language=language),
            data=DataConfig(seq_length=self.length),
            parallel=ParallelConfig(**self.parallel),
            training=TrainingConfig(
                global_batch_size=1, bf16=True, recompute_vision=True, **self.training
            ),
        )

    def load(self) -> PackLoad:
        """The pack: 60 % image tokens, a tenth of the others scored."""
        each = self.length // self.documents
        tiles = self.documents * int(each * 0.6 / 256)
        rows = (self.length - 258 * tiles) // 10
        return PackLoad(tiles=tiles, loss_tokens=rows, lengths=(each,) * self.documents)


LONG: dict[str, Any] = {"length": 128 * 1024, "documents": 1}
FEW_LAYERS: dict[str, Any] = {"layers": 8}
STEPS = [
    Measured(name="32K full", peak=78.0, seconds=2.208),
    Measured(name="32K full CP2", peak=97.5, seconds=2.216, parallel=CP2),
    Measured(name="32K mlp", peak=90.7, seconds=2.137, training=MLP),
    Measured(name="128K full", peak=104.8, seconds=22.73, **LONG),
    Measured(name="128K full 8 layers", peak=57, seconds=7.28, **LONG, **FEW_LAYERS),
    Measured(name="128K mlp 8 layers", peak=70, seconds=6.23, training=MLP, **LONG, **FEW_LAYERS),
    Measured(name="128K none 8 layers", peak=121, seconds=5.89, training={}, **LONG, **FEW_LAYERS),
    Measured(name="32K full 8 layers", peak=36.7, seconds=0.849, **FEW_LAYERS),
]
TOO_LARGE = [
    Measured(name="32K none", peak=139.8, seconds=0, training={}),
    Measured(name="256K full", peak=139.8, seconds=0, length=256 * 1024, documents=1),
]
"""Out of memory on 139.8 GiB; the second in its second step, when Adam's moments are there."""


def _eight(name: str, seconds: float, **fields: Any) -> Measured:
    """8 of 28 layers that keep attention; benchmarks/results/2026-11-28-training.md."""
    kept = FULL | {"recompute_keep_attention_layers": -1}
    return Measured(name=name, peak=0, seconds=seconds, training=kept, **FEW_LAYERS, **fields)


TE, FA4 = ({"attention_backend": name} for name in ("te", "fa4"))
TIMED = [
    _eight("32K TP2 te", 0.846, parallel=TP2 | TE),
    _eight("32K TP2 fa4", 0.836, parallel=TP2 | FA4),
    _eight("128K TP2 te", 6.319, parallel=TP2 | TE, **LONG),
    _eight("128K TP2 fa4", 5.767, parallel=TP2 | FA4, **LONG),
    _eight("128K CP2 te", 6.136, parallel=CP2 | TE, **LONG),
    _eight("32K CP2 fa4", 0.831, parallel=CP2 | FA4),
]
"""Steps of which only the time was noted."""
