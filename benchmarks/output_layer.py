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
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from output_measure import (
    FULL_SIZE,
    GIB,
    TINY,
    Problem,
    Sizes,
    Table,
    free,
    make_layer,
    make_problem,
    measure,
    row_of,
)
from output_prefill import prefill
from torch import Tensor

from megatron_vita import platform
from megatron_vita.config import ParallelConfig, Recipe
from megatron_vita.model.output.output import OutputLayer
from megatron_vita.model.output.softmax import LossForm, Shard, summarize, write_gradient
from megatron_vita.parallel import groups


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
            everything = peer(layer.weight, problem, selected=False)
            table.add(f"{name}, all positions", *run(everything))
            if rows < positions:
                scored = peer(layer.weight, problem, selected=True)
                table.add(f"{name}, scored rows", *run(scored))
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
        # Where all rows are scored, they are not copied.
        copy = 0
        if rows < positions:
            copy = rows
        needed = 2 * (positions * sizes.hidden + copy * sizes.hidden + layer.weight.numel()) / GIB
        rest: float | str = ""
        if result is not None:
            rest = result[1] - needed
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
            # The first row, which the others are compared with.
            if name == "TP1" and kind == "bf16 .grad":
                one = result[0]
            table.add(f"{name}, {kind}", *row_of(result), result[0] / one)
        del layer, problem
        free()
    yield table


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
