"""Time and memory of the output layer against full logits and other libraries, and of prefill with
and without it.

    python benchmarks/output_layer.py loss --out results.md
    torchrun --nproc_per_node 2 benchmarks/output_layer.py ranks prefill --out results.md

`loss` needs a GPU, liger-kernel and cut-cross-entropy; `ranks` (two GPUs against one) and `prefill`
need two GPUs. `--tiny` runs the same on any machine, for a look at the script itself. Tables go to
the end of the file and are printed last. Memory is what a forward and backward pass takes at its
peak over what it was given, gradients included.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_vita import platform
from megatron_vita.config import LanguageConfig, OutputConfig, ParallelConfig, Recipe
from megatron_vita.model.backends import TorchBackend
from megatron_vita.model.build import transformer_config
from megatron_vita.model.language import LanguageModel
from megatron_vita.model.output import OutputLayer
from megatron_vita.model.softmax import LossForm, Shard, summarize, write_gradient
from megatron_vita.parallel import groups

GIB = 1 << 30
OUT_OF_MEMORY = "out of memory"


@dataclass
class Table:
    """Rows of text below a head."""

    title: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        """Append a row and print it at once."""
        self.rows.append(
            [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
        )
        if not dist.is_initialized() or dist.get_rank() == 0:
            sys.stderr.write(" | ".join(self.rows[-1]) + "\n")

    def __str__(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return (
            f"\n## {self.title}\n\n"
            + "\n".join("| " + " | ".join(line) + " |" for line in lines)
            + "\n"
        )


@dataclass(frozen=True)
class Sizes:
    """Sizes to measure; the small ones are for trying the script."""

    hidden: int
    vocab: int
    layers: int
    scale: int  # positions are divided by it
    seconds: float  # of measuring for a number
    prefill: tuple[int, ...] = (1, 4, 8, 32)  # times 8,192 tokens

    def positions(self, count: int) -> int:
        """`count`, or its small stand-in."""
        return count // self.scale


FULL_SIZE = Sizes(hidden=5120, vocab=152_064, layers=48, scale=1, seconds=1.5)
TINY = Sizes(hidden=64, vocab=1000, layers=2, scale=1024, seconds=0.01)


@dataclass
class Problem:
    """A hidden state [t, H], scored rows and their labels; `every_label` [t] has -100 elsewhere."""

    hidden: Tensor
    rows: Tensor  # on the host, as are labels
    labels: Tensor
    every_label: Tensor


def make_problem(sizes: Sizes, *, positions: int, rows: int) -> Problem:
    """Random, the same on every rank; hidden states have the size that a final norm gives them."""
    generator = torch.Generator().manual_seed(0)
    device = platform.device()
    chosen = torch.randperm(positions, generator=generator)[:rows].sort().values
    labels = torch.randint(0, sizes.vocab, (rows,), generator=generator)
    every = torch.full((positions,), -100).index_copy(0, chosen, labels).to(device)
    state = torch.Generator(device).manual_seed(0)
    hidden = torch.empty(positions, sizes.hidden, device=device, dtype=torch.bfloat16)
    for part in hidden.split(1 << 16):
        part.copy_(torch.randn(part.shape, device=device, generator=state))
    return Problem(hidden.requires_grad_(), chosen, labels, every)


def make_layer(sizes: Sizes, **options: Any) -> OutputLayer:
    """An output layer of the groups that exist."""
    recipe = Recipe().replaced(
        {
            "training.bf16": True,
            "parallel.tensor_model_parallel_size": groups.rank_layout().tp_size,
            "parallel.sequence_parallel": options.pop("sequence_parallel", False),
            "model.language.hidden_size": sizes.hidden,
        }
    )
    config = transformer_config(recipe, fused=False)
    config.perform_initialization = False
    layer = OutputLayer(
        config, vocab_size=sizes.vocab, options=OutputConfig(**options), owns_weight=True
    )
    with torch.no_grad():
        layer.weight.normal_(std=0.02)
    return layer


def free() -> None:
    """Release unused GPU memory."""
    gc.collect()
    if platform.on_cuda():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def seconds_of(call: Callable[[], Any]) -> float:
    """Measure one call's time on the device."""
    if not platform.on_cuda():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def measure(
    call: Callable[[], Any], *, reset: Callable[[], None], seconds: float
) -> tuple[float, float] | None:
    """Median seconds of at least 3 calls, and peak GiB above the start; None if memory runs out."""
    free()
    try:
        reset()
        call()  # compiles, and makes the libraries' workspaces
        reset()
        free()
        before = torch.cuda.memory_allocated() if platform.on_cuda() else 0
        if platform.on_cuda():
            torch.cuda.reset_peak_memory_stats()
        call()
        peak = torch.cuda.max_memory_allocated() if platform.on_cuda() else 0
        times: list[float] = []
        several = dist.get_world_size() > 1  # ranks must make as many calls as one another
        while len(times) < (10 if several else 3) or (
            not several and sum(times) < seconds and len(times) < 20
        ):
            reset()
            times.append(seconds_of(call))
        return statistics.median(times), (peak - before) / GIB
    except torch.OutOfMemoryError:
        return None
    finally:
        reset()
        free()


def ours(layer: OutputLayer, problem: Problem) -> Callable[[], None]:
    """Run the output layer forward and backward."""
    hidden = problem.hidden.unsqueeze(1)
    return lambda: (
        layer(hidden, rows=problem.rows, labels=problem.labels).sum().backward(retain_graph=False)
    )


def full_logits(weight: Tensor, problem: Problem, *, selected: bool) -> Callable[[], None]:
    """fp32 logits of all rows at once, of all positions or of the scored ones."""

    def call() -> None:
        hidden, labels = pick(problem, selected)
        F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum").backward()

    return call


def pick(problem: Problem, selected: bool) -> tuple[Tensor, Tensor]:
    """All positions with their labels, or the scored ones alone."""
    if not selected:
        return problem.hidden, problem.every_label
    device = problem.hidden.device
    return problem.hidden[problem.rows.to(device)], problem.labels.to(device)


def liger(weight: Tensor, problem: Problem, *, selected: bool) -> Callable[[], None]:
    """Liger Kernel's fused linear cross entropy."""
    from liger_kernel.ops.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyFunction as Fused,
    )

    def call() -> None:
        hidden, labels = pick(problem, selected)
        Fused.apply(hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum")[0].backward()

    return call


def cut_cross_entropy(weight: Tensor, problem: Problem, *, selected: bool) -> Callable[[], None]:
    """Apple's kernel, which never writes logits to memory."""
    from cut_cross_entropy import linear_cross_entropy

    def call() -> None:
        hidden, labels = pick(problem, selected)
        linear_cross_entropy(hidden, weight, labels, reduction="sum").backward()

    return call


PEERS = {
    "full fp32 logits": full_logits,
    "Liger 0.8.5 fused linear cross entropy": liger,
    "cut-cross-entropy 25.1.1": cut_cross_entropy,
}


def reset_of(layer: OutputLayer, problem: Problem) -> Callable[[], None]:
    """Forgets gradients."""

    def reset() -> None:
        layer.weight.grad = problem.hidden.grad = None

    return reset


def row_of(result: tuple[float, float] | None) -> list[object]:
    """Format milliseconds and GiB, or that memory ran out."""
    if result is None:
        return [OUT_OF_MEMORY, ""]
    return [result[0] * 1000, result[1]]


def time_losses(sizes: Sizes) -> Iterator[Table]:
    """Measure every peer on 5 % of 131,072 rows and on all of 32,768."""
    groups.initialize_groups(Recipe().parallel)
    layer = make_layer(sizes)
    for positions, rows in ((131_072, 6_554), (32_768, 32_768)):
        positions = sizes.positions(positions)
        rows = max(1, sizes.positions(rows))
        table = Table(
            f"{rows:,} loss rows of {positions:,} positions, forward and backward",
            ["what", "ms", "GiB at the peak"],
        )
        problem = make_problem(sizes, positions=positions, rows=rows)
        reset = reset_of(layer, problem)

        def run(call: Callable[[], None], reset: Callable[[], None] = reset) -> list[object]:
            return row_of(measure(call, reset=reset, seconds=sizes.seconds))

        table.add("this output layer, bf16 .grad", *run(ours(layer, problem)))
        layer.weight.main_grad = torch.zeros(layer.weight.shape, device=layer.weight.device)
        table.add("this output layer, fp32 main_grad", *run(ours(layer, problem)))
        del layer.weight.main_grad
        for name, peer in PEERS.items():
            for selected in (False, True) if rows < positions else (False,):
                where = "scored rows" if selected else "all positions"
                table.add(f"{name}, {where}", *run(peer(layer.weight, problem, selected=selected)))
        yield table
        del problem, reset, run
        free()


def memory_by_length(sizes: Sizes) -> Iterator[Table]:
    """Measure memory beyond inputs, gradients and one copy of the scored rows."""
    groups.initialize_groups(Recipe().parallel)
    layer = make_layer(sizes)
    head = [
        "positions",
        "loss rows",
        "ms",
        "GiB at the peak",
        "of which gradients and scored rows",
        "the rest",
    ]
    table = Table("Memory by length, bf16 .grad", head)
    for positions, share in ((8_192, 0.05), (131_072, 0.05), (131_072, 1.0), (1_048_576, 0.05)):
        positions = sizes.positions(positions)
        rows = int(positions * share)
        problem = make_problem(sizes, positions=positions, rows=rows)
        result = measure(
            ours(layer, problem), reset=reset_of(layer, problem), seconds=sizes.seconds
        )
        copy = rows if rows < positions else 0
        needed = 2 * (positions * sizes.hidden + copy * sizes.hidden + layer.weight.numel()) / GIB
        rest = "" if result is None else result[1] - needed
        table.add(f"{positions:,}", f"{rows:,}", *row_of(result), needed, rest)
        del problem
        free()
    yield table


def chunk_sizes(sizes: Sizes) -> Iterator[Table]:
    """Measure larger and smaller buffers of logits."""
    groups.initialize_groups(Recipe().parallel)
    layer = make_layer(sizes)
    table = Table(
        "Size of the buffer of logits",
        ["MiB", "gradient", "ms for 6,554 rows", "ms for 32,768 rows"],
    )
    rows = [max(1, sizes.positions(count)) for count in (6_554, 32_768)]
    problems = [make_problem(sizes, positions=count, rows=count) for count in rows]
    for main_grad in (False, True):
        if main_grad:
            layer.weight.main_grad = torch.zeros(layer.weight.shape, device=layer.weight.device)
        for mebibytes in (192, 320, 448, 480, 896):
            layer.chunk_bytes = mebibytes << 20
            found = [
                measure(ours(layer, p), reset=reset_of(layer, p), seconds=0.3) for p in problems
            ]
            times = [row_of(result)[0] for result in found]
            table.add(mebibytes, "fp32 main_grad" if main_grad else "bf16 .grad", *times)
    yield table
    free()


def softmax_step(sizes: Sizes) -> Iterator[Table]:
    """Measure the step between the matrix products: losses of a chunk, and its gradient over its
    logits."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    groups.initialize_groups(Recipe().parallel)
    form = LossForm(vocab_size=sizes.vocab)
    shard = Shard(start=0, columns=sizes.vocab, group=groups.tensor_group())
    rows = max(1, sizes.positions(1408))
    logits = torch.randn(rows, sizes.vocab, device=platform.device()).bfloat16()
    targets = torch.randint(0, sizes.vocab, (rows,), device=logits.device)
    scale = torch.ones(rows, device=logits.device)

    def step() -> None:
        summary = summarize(logits, targets=targets, shard=shard)
        form.losses(summary)
        write_gradient(
            logits, targets=targets, shard=shard, summary=summary, scale=scale, form=form
        )

    def peer() -> None:
        LigerCrossEntropyFunction.apply(
            logits.requires_grad_(), targets, None, -100, 0.0, 0.0, "sum", None, False
        )

    table = Table(
        f"Softmax and gradient of {rows:,} rows of bf16 logits, in place", ["what", "ms", "GiB"]
    )
    for name, call in (("this output layer", step), ("Liger 0.8.5's inner kernel", peer)):
        table.add(name, *row_of(measure(call, reset=lambda: None, seconds=0.2)))
    yield table


def two_ranks(sizes: Sizes) -> Iterator[Table]:
    """Compare one GPU with tensor parallelism over two, on 5 % of 131,072 rows."""
    positions = sizes.positions(131_072)
    rows = sizes.positions(6_554)
    table = Table(
        f"{rows:,} loss rows of {positions:,} positions on two GPUs",
        ["layout", "ms", "GiB a GPU", "of TP1"],
    )
    one = 0.0
    for name, tp, sequence_parallel in (("TP1", 1, False), ("TP2", 2, False), ("TP2+SP", 2, True)):
        groups.initialize_groups(ParallelConfig(tensor_model_parallel_size=tp))
        layer = make_layer(sizes, sequence_parallel=sequence_parallel)
        problem = make_problem(sizes, positions=positions, rows=rows)
        if sequence_parallel:
            share = problem.hidden.detach().chunk(2)[dist.get_rank()]
            problem.hidden = share.clone().requires_grad_()
        for kind in ("bf16 .grad", "fp32 main_grad"):
            if kind == "fp32 main_grad":
                layer.weight.main_grad = torch.zeros(layer.weight.shape, device=layer.weight.device)
            result = measure(
                ours(layer, problem), reset=reset_of(layer, problem), seconds=sizes.seconds
            )
            assert result is not None
            one = result[0] if name == "TP1" and kind == "bf16 .grad" else one
            table.add(f"{name}, {kind}", *row_of(result), result[0] / one)
        del layer, problem
        free()
    yield table


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
                parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(std=0.02)
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
            fits = self.run(middle, full=full, layers=2) is not None
            low, high = (middle, high) if fits else (low, middle)
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
        if tokens > both:
            full = None
        else:
            full = model.run(tokens, full=True, layers=every) if tokens < both else longest_time
        wanted = model.run(tokens, full=False, layers=every)
        share = f"{wanted / full:.3f}" if full and wanted else ""
        times.add(
            f"{tokens:,}", OUT_OF_MEMORY if full is None else full, wanted or OUT_OF_MEMORY, share
        )


PARTS: dict[str, list[Callable[[Sizes], Iterator[Table]]]] = {
    "chunks": [chunk_sizes, softmax_step],
    "loss": [time_losses, memory_by_length],
    "ranks": [two_ranks],
    "prefill": [prefill],
}


def describe_device() -> str:
    """The hardware and the versions that count."""
    if not platform.on_cuda():
        return "CPU"
    return (
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}"
    )


def main() -> None:
    """Measure the named parts and write their tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--out", type=Path, help="file to append the tables to")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument(
        "--prefill", type=int, nargs="*", help="lengths to prefill, in units of 8,192 tokens"
    )
    arguments = parser.parse_args()
    platform.initialize_process()
    sizes = TINY if arguments.tiny else FULL_SIZE
    if arguments.prefill is not None:
        sizes = replace(sizes, prefill=tuple(arguments.prefill))
    tables = [
        table
        for part in arguments.parts
        for measurement in PARTS[part]
        for table in measurement(sizes)
    ]
    if dist.get_rank() == 0:
        text = f"\n{describe_device()}; `{' '.join(sys.argv)}`\n" + "".join(
            str(table) for table in tables
        )
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(text)
        sys.stdout.write(text)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
