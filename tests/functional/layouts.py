"""Layouts of 2 and 4 processes in which every pair of features meets at least once."""

import itertools
import random
from dataclasses import dataclass

import numpy as np

# Fields of `parallel` and `training`, and of `data` and `model`, by feature and value.
FEATURES: dict[str, dict[str, dict]] = {
    "tensor": {
        "tp1": {},
        "tp2": {"tensor_model_parallel_size": 2},
        "tp2sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    },
    "pipeline": {
        "pp1": {},
        "pp2": {"pipeline_model_parallel_size": 2},
        "pp2first1": {
            "pipeline_model_parallel_size": 2,
            "num_layers_in_first_pipeline_stage": 1,
            "num_layers_in_last_pipeline_stage": 3,
        },
        "pp2first3": {
            "pipeline_model_parallel_size": 2,
            "num_layers_in_first_pipeline_stage": 3,
            "num_layers_in_last_pipeline_stage": 1,
        },
        "pp2vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    },
    "context": {"cp1": {}, "cp2": {"context_parallel_size": 2}},
    "data": {"dp1": {}, "dp2": {}},
    "optimizer": {
        "split": {},
        "replicated": {"use_distributed_optimizer": False},
        "replicated_overlapped": {"use_distributed_optimizer": False, "overlap_grad_reduce": True},
        "overlapped": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    },
    "recompute": {
        "keep": {},
        "full": {"recompute_granularity": "full"},
        "first_layer": {"recompute_granularity": "full", "recompute_num_layers": 1},
        "uniform": {"recompute_granularity": "full", "recompute_method": "uniform"},
        "attention": {"recompute_granularity": "selective"},
        "mlp": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
        "mlp_pieces": {
            "recompute_granularity": "selective",
            "recompute_modules": ["mlp"],
            "mlp_chunk_tokens": 24,
        },
        "attention_kept": {
            "recompute_granularity": "full",
            "recompute_keep_attention_layers": -1,
        },
        "kept_in_pieces": {
            "recompute_granularity": "full",
            "recompute_keep_attention_layers": 1,
            "mlp_chunk_tokens": 48,
        },
        "offloaded": {"recompute_granularity": "full", "activation_offload_fraction": 1.0},
        "half_offloaded": {
            "recompute_granularity": "full",
            "recompute_keep_attention_layers": -1,
            "mlp_chunk_tokens": 100,
            "activation_offload_fraction": 0.5,
        },
    },
    "tower": {
        "dealt": {},
        "recomputed": {"recompute_vision": True},
        "from_pixels": {"recompute_vision": True, "recompute_vision_method": "tiles"},
        "together": {"vision_tensor_parallel": True},
    },
    "turns": {"at_once": {}, "two_tiles": {"vision_tiles_at_once": 2}},
    "model": {
        "untied": {},
        "tied": {"untie_embeddings_and_output_weights": False},
        "qwen3": {"qk_layernorm": True, "add_qkv_bias": False},
        "one_group": {"num_query_groups": 1, "qk_layernorm": True},
        "text_only": {"text_only": True},
    },
    "frozen": {
        "all_trained": {},
        "projector_only": {"freeze_vision_model": True, "freeze_language_model": True},
        "tower_frozen": {"freeze_vision_model": True},
    },
    "documents": {"isolated": {}, "joined": {"isolate_documents": False}},
}
SEMANTIC = ("model", "frozen", "documents")  # what a single process computes depends on these alone


@dataclass(frozen=True)
class Layout:
    """One value for each feature."""

    values: tuple[str, ...]

    @property
    def name(self) -> str:
        """The values that differ from the defaults."""
        plain = [next(iter(values)) for values in FEATURES.values()]
        return (
            "-".join(
                value for value, usual in zip(self.values, plain, strict=True) if value != usual
            )
            or "plain"
        )

    def value(self, feature: str) -> str:
        """The value of a feature."""
        return self.values[list(FEATURES).index(feature)]

    @property
    def world(self) -> int:
        """Number of processes."""
        split = (
            self.value("tensor") != "tp1",
            self.value("pipeline") != "pp1",
            self.value("context") != "cp1",
        )
        return 2 ** (sum(split) + (self.value("data") == "dp2"))

    @property
    def fields(self) -> dict:
        """Fields of the recipe."""
        chosen = [
            FEATURES[feature][value] for feature, value in zip(FEATURES, self.values, strict=True)
        ]
        return {name: field for fields in chosen for name, field in fields.items()}

    @property
    def start(self) -> str:
        """Kind of model whose initial weights it loads; those of a whole model also serve text-only
        ones."""
        kind = self.value("model")
        if kind == "text_only":
            return "untied"
        return kind

    @property
    def reference(self) -> "Layout":
        """Layout of the single process that must compute the same."""
        plain = (next(iter(values)) for values in FEATURES.values())
        kept = zip(FEATURES, self.values, plain, strict=True)
        return Layout(
            tuple(value if feature in SEMANTIC else usual for feature, value, usual in kept)
        )

    @property
    def is_possible(self) -> bool:
        """True for 2 or 4 processes and no feature without its object."""
        together = self.value("tower") == "together"
        if together and (self.value("tensor") == "tp1" or self.value("model") == "text_only"):
            return False
        if self.value("model") == "text_only" and self.value("frozen") != "all_trained":
            return False
        return self.world in (2, 4)


def layout_of(*values: str) -> Layout:
    """Layout with the given values, and default values of all other features."""
    chosen = []
    for known in FEATURES.values():
        named = [value for value in values if value in known]
        chosen.append(named[0] if named else next(iter(known)))
    return Layout(tuple(chosen))


def covering_layouts(
    worlds: tuple[int, ...] = (2, 4), *, seed: int = 0, tries: int = 400
) -> list[Layout]:
    """A small set of layouts in which each possible pair of values occurs. Greedy and seeded."""
    names = [list(values) for values in FEATURES.values()]
    every = [layout for layout in map(Layout, itertools.product(*names)) if layout.is_possible]
    every = [layout for layout in every if layout.world in worlds]
    codes = np.array(
        [[names[i].index(value) for i, value in enumerate(layout.values)] for layout in every]
    )
    widths = [len(values) for values in names]
    pairs = list(itertools.combinations(range(len(names)), 2))
    offsets = np.cumsum([0, *(widths[i] * widths[j] for i, j in pairs)])
    ids = np.stack(
        [
            offset + codes[:, i] * widths[j] + codes[:, j]
            for offset, (i, j) in zip(offsets, pairs, strict=False)
        ],
        axis=1,
    )
    left = np.zeros(offsets[-1], dtype=bool)
    left[ids] = True  # pairs that can meet
    draw = random.Random(seed)
    chosen = []
    while left.any():
        missing = np.flatnonzero(left)[0]
        rows = np.flatnonzero((ids == missing).any(axis=1))
        candidates = [int(rows[draw.randrange(len(rows))]) for _ in range(tries)]
        best = max(candidates, key=lambda row: left[ids[row]].sum())
        left[ids[best]] = False
        chosen.append(every[best])
    return chosen
