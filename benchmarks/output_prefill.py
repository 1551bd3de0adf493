"""Prefill of a language model with and without logits of all positions."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from output_measure import OUT_OF_MEMORY, Sizes, Table, free, seconds_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_vita import platform
from megatron_vita.config import LanguageConfig, Recipe
from megatron_vita.model.backends.backends import TorchBackend
from megatron_vita.model.build import transformer_config
from megatron_vita.model.language import LanguageModel
from megatron_vita.parallel import groups


@dataclass
class PrefillAttention:
    """Causal attention of one document that fills a cache allocated beforehand, query group by
    query group."""

    keys: Tensor  # [layers, groups, T, d]
    values: Tensor
    qkv_format: str = "documents"

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [t, heads, d]; key, value [t, groups, d] -> [t, heads, d]."""
        result = torch.empty_like(query)
        heads = query.shape[1] // key.shape[1]
        for group in range(key.shape[1]):
            k = self.keys[layer - 1, group]
            v = self.values[layer - 1, group]
            k.copy_(key[:, group])
            v.copy_(value[:, group])
            own = slice(group * heads, (group + 1) * heads)
            q = query[:, own].transpose(0, 1).contiguous()
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if platform.on_cuda() else nullcontext():
                out = F.scaled_dot_product_attention(
                    q[None], k[None, None], v[None, None], is_causal=True, enable_gqa=True
                )
            result[:, own] = out[0].transpose(0, 1)
        return result


class PrefillBackend(TorchBackend):
    """Layers of the `torch` backend over a cache of all layers."""

    cache: PrefillAttention

    def attention_metadata(
        self, cu_seqlens: Tensor, *, inverse_frequencies: Tensor
    ) -> tuple[Any, Tensor]:
        """The cache, and the rotary angles of the whole document."""
        return self.cache, super().attention_metadata(
            cu_seqlens, inverse_frequencies=inverse_frequencies
        )[1]


class Prefill:
    """A language model of Qwen2.5-14B's shape with random weights, over two GPUs."""

    def __init__(self, sizes: Sizes) -> None:
        shape = LanguageConfig()
        if sizes.scale > 1:
            shape = LanguageConfig(
                num_layers=2,
                hidden_size=64,
                ffn_hidden_size=128,
                vocab_size=1000,
                num_attention_heads=4,
                num_query_groups=2,
                kv_channels=16,
            )
        recipe = Recipe().replaced(
            {
                "training.bf16": True,
                "parallel.sequence_parallel": True,
                "parallel.tensor_model_parallel_size": 2,
                "model.language": shape,
            }
        )
        groups.initialize_groups(recipe.parallel)
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        config = transformer_config(recipe, fused=False)
        config.perform_initialization = False
        self.shape = shape
        self.backend = PrefillBackend()
        self.model = LanguageModel(
            config,
            shape=shape,
            output=recipe.model.output,
            backend=self.backend,
            pre_process=True,
            post_process=True,
        ).to(platform.device())
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(std=0.02)
        self.layers = self.model.decoder.layers

    @torch.no_grad()
    def run(self, tokens: int, *, full: bool, layers: int) -> float | None:
        """Seconds until the last row's logits, through `layers` layers with the cache of all; None:
        out of memory."""
        free()  # also what an earlier call that ran out of memory held
        self.model.output_layer.full_logits = full
        self.model.decoder.layers = self.layers[:layers]
        device = platform.device()
        shape = self.shape
        try:
            room = (shape.num_layers, shape.num_query_groups // 2, tokens, shape.kv_channels)
            self.backend.cache = PrefillAttention(
                torch.empty(room, device=device, dtype=torch.bfloat16),
                torch.empty(room, device=device, dtype=torch.bfloat16),
            )
            ids = torch.randint(
                0, shape.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0)
            ).to(device)
            bounds = torch.tensor([0, tokens], dtype=torch.int32)
            return seconds_of(lambda: self._forward(ids, bounds))
        except torch.OutOfMemoryError:
            return None
        finally:
            self.backend.__dict__.pop("cache", None)
            free()

    def _forward(self, ids: Tensor, bounds: Tensor) -> Tensor:
        hidden = self.model.decode(self.model.embed(ids), cu_seqlens=bounds)
        return self.model.output(hidden, rows=torch.tensor([len(ids) - 1]))

    def longest(self, *, full: bool, low: int, high: int, step: int) -> int:
        """Longest context that fits, to within `step`, if `low` does and `high` does not.

        Weights and cache are those of all layers; two are run, since every layer after the first
        takes as much.
        """
        while high - low > step:
            middle = (low + high) // 2 // step * step
            if self.run(middle, full=full, layers=2) is not None:
                low = middle
            else:
                high = middle
        return low


def prefill(sizes: Sizes) -> Iterator[Table]:
    """Compare full logits with wanted rows only: longest context, and time by length."""
    model = Prefill(sizes)
    unit = sizes.positions(8192)
    yield (longest := Table("Prefill of Qwen2.5-14B's shape, TP2: longest context before memory is out", [
        "output layer", "tokens", "times"
    ]))  # fmt: skip
    if platform.on_cuda():
        # the same on both ranks, so that both run out together
        torch.cuda.set_per_process_memory_fraction(0.96)
    model.run(unit, full=False, layers=1)
    if sizes.scale == 1:
        bounds = {True: (16, 18), False: (74, 81)}
    else:
        bounds = {True: (1, 4), False: (2, 8)}
    limits = {
        full: model.longest(full=full, low=unit * low, high=unit * high, step=unit)
        for full, (low, high) in bounds.items()
    }
    every = len(model.layers)
    both = limits[True]
    while (longest_time := model.run(both, full=True, layers=every)) is None:
        both -= unit
    longest.add("full logits", f"{both:,}", 1.0)
    longest.add("wanted rows", f"{limits[False]:,}", limits[False] / both)
    yield (
        times := Table(
            "Prefill time by length, seconds", ["tokens", "full logits", "wanted rows", "share"]
        )
    )
    for tokens in sorted({both, *(unit * count for count in sizes.prefill)}):
        full = None  # more than fits with full logits
        if tokens == both:
            full = longest_time
        elif tokens < both:
            full = model.run(tokens, full=True, layers=every)
        wanted = model.run(tokens, full=False, layers=every)
        share = ""
        if full and wanted:
            share = f"{wanted / full:.3f}"
        times.add(
            f"{tokens:,}", OUT_OF_MEMORY if full is None else full, wanted or OUT_OF_MEMORY, share
        )
