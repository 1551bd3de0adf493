"""Text report of a dry run."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np

from megatron_vita.config import Recipe
from megatron_vita.costs.devices import DEVICES, Device
from megatron_vita.costs.fitting import Room
from megatron_vita.costs.memory.checkpoint_size import checkpoint_bytes
from megatron_vita.costs.memory.memory import GIB, describe_full_pack
from megatron_vita.costs.memory.parameters import model_parameters
from megatron_vita.costs.prediction import Prediction
from megatron_vita.costs.remedies import find_remedies, name_remedies
from megatron_vita.costs.tables import align
from megatron_vita.errors import ConfigError
from megatron_vita.rounding import ceil_div
from megatron_vita.sizes import readable_bytes
from megatron_vita.training.dry_run import DryRun, PackReport
from megatron_vita.training.metrics.wording import (
    count,
    describe_layout,
    describe_named_layout,
    describe_quantization,
)

Row = Sequence[str]


def describe(recipe: Recipe, report: DryRun, *, ranks_per_node: int) -> str:
    """Format all sections, one after another."""
    sections = (
        _layout(recipe, report, ranks_per_node),
        _stages(recipe, report),
        _memory(recipe, report, ranks_per_node),
        _time(report.prediction),
        _packs(recipe, report),
        _balance(recipe, report),
    )
    return "\n\n".join("\n".join(section) for section in map(list, sections) if section)


def _layout(recipe: Recipe, report: DryRun, ranks_per_node: int) -> Iterator[str]:
    parallel = recipe.parallel
    tp = parallel.tensor_model_parallel_size
    cp = parallel.context_parallel_size
    if named := describe_named_layout(recipe):
        yield named
    yield describe_layout(recipe, world_size=report.world_size)
    yield "  rank = ((stage x DP + replica) x CP + context) x TP + tensor"
    for i, stage in enumerate(report.stages):
        yield f"  stage {i} of replica 0: ranks {_span(stage.ranks)}"
    if report.data_parallel > 1:
        yield f"  replica r of a stage: r x {tp * cp} further on"
    for name, ranks in (("TP", tp), ("TP x CP", tp * cp)):
        nodes = ceil_div(ranks, ranks_per_node)
        where = f"over {nodes} nodes"
        if nodes == 1:
            where = "inside a node"
        yield f"  {name} groups lie {where}, with {ranks_per_node} ranks a node"


def _span(ranks: range) -> str:
    if len(ranks) == 1:
        return f"{ranks.start}"
    return f"{ranks.start} to {ranks.stop - 1}"


def _stages(recipe: Recipe, report: DryRun) -> Iterator[str]:
    whole = model_parameters(recipe.model)
    yield f"parameters of the model: {count(whole)}; on a rank of each stage:"
    names = ("vision", "projector", "embedding", "layers", "output", "total")
    rows: list[Row] = [("stage", "layers held", *names, "trained", "FLOPs")]
    total = sum(stage.flops for stage in report.stages)
    for i, stage in enumerate(report.stages):
        counts = [count(getattr(stage.parameters, name)) for name in names]
        rows.append(
            (
                str(i),
                str(stage.layers),
                *counts,
                count(stage.trained),
                f"{stage.flops / total:.1%}",
            )
        )
    yield from align(rows)
    if quantized := describe_quantization(recipe):
        yield f"of the layers' parameters, {quantized}"


def _memory(recipe: Recipe, report: DryRun, ranks_per_node: int) -> Iterator[str]:
    yield (
        "estimated device memory of a rank in GiB; peak: allocated by torch from the second step on; "
        "device: including allocator overhead and libraries:"
    )
    rows: list[Row] = []
    for i, stage in enumerate(report.stages):
        memory = stage.memory
        parts = memory.parts() | {"peak": memory.peak, "device": memory.device}
        if not rows:
            rows.append(("stage", *parts, "highest in"))
        rows.append((str(i), *map(_gib, parts.values()), memory.highest.name))
    yield from align(rows)
    yield "estimated host memory of a rank in GiB:"
    rows = []
    for i, stage in enumerate(report.stages):
        sizes = asdict(stage.host) | {"total": stage.host.total}
        if not rows:
            rows.append(("stage", *sizes))
        rows.append((str(i), *map(_gib, sizes.values())))
    yield from align(rows)
    # The fullest stage for every rank of a node: nodes may hold ranks of one stage only.
    ranks = min(ranks_per_node, report.world_size)
    training = max(stage.host.training for stage in report.stages) * ranks / GIB
    yield f"training takes about {training:.1f} GiB of a node's own memory, with {ranks} ranks a node"
    if recipe.checkpoint.save:
        saving = max(stage.host.saving for stage in report.stages) * ranks / GIB
        yield (
            f"writing a checkpoint takes about {saving:.1f} GiB of a node's own memory, with {ranks} "
            "ranks a node"
        )
        yield _disk(recipe)


def _disk(recipe: Recipe) -> str:
    """Format the disk space for the retained checkpoints and the one being written beside them."""
    size = checkpoint_bytes(recipe)
    count = recipe.checkpoint.keep + 1
    return (
        f"a checkpoint takes about {readable_bytes(size)} on disk; {recipe.checkpoint.save} needs room for {count}, "
        f"{readable_bytes(count * size)}: the newest {recipe.checkpoint.keep} and the one being written"
    )


def _time(prediction: Prediction) -> Iterator[str]:
    """Yield step time by kind of work, and rates; FLOPs alone for an unknown device."""
    flops = f"{prediction.flops:.3g} model FLOPs"
    if prediction.time is None or not prediction.seconds:
        names = ", ".join(device.name for device in DEVICES)
        yield f"a step has {flops}; its time is predicted for --device {names}"
        return
    yield (
        f"a step of {flops} is predicted to take {prediction.seconds:.2f} s: "
        f"{prediction.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, "
        f"{prediction.tflops_per_gpu:.0f} TFLOP/s/GPU; in seconds, of the slowest stage:"
    )
    parts = asdict(prediction.time)
    yield from align([tuple(parts), tuple(f"{seconds:.2f}" for seconds in parts.values())])


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def _packs(recipe: Recipe, report: DryRun) -> Iterator[str]:
    if not report.packs:
        yield f"packs: not read; taken to be {describe_full_pack(recipe)}"
        return
    yield "next packs, least to most over the ranks that share them:"
    rows: list[Row] = [
        (
            "pack",
            "documents",
            "tokens",
            "a CP rank",
            "tiles",
            "a rank",
            "loss tokens",
            "a TP x CP rank",
        )
    ]
    rows += [_pack(pack) for pack in report.packs]
    yield from align(rows)


def _pack(pack: PackReport) -> Row:
    values = [str(pack.pack_id + 1), str(len(pack.lengths))]
    for counts in (pack.tokens, pack.tiles, pack.loss_tokens):
        values += [f"{counts.sum():,}", f"{counts.min():,} to {counts.max():,}"]
    return values


def _balance(recipe: Recipe, report: DryRun) -> Iterator[str]:
    costs = np.array(report.step_costs)
    if len(costs) > 1:
        ratio = costs.max() / max(costs.mean(), 1)
        yield f"packs of the first step over {len(costs)} replicas: dearest over mean {ratio:.3f}"
    if report.better_ends is not None:
        first, last = report.better_ends
        yield (
            "stages would be loaded more evenly with parallel.num_layers_in_first_pipeline_stage="
            f"{first} parallel.num_layers_in_last_pipeline_stage={last}"
        )
    stages = len(report.stages)
    packs_of_replica = recipe.training.global_batch_size // report.data_parallel
    if stages > 1 and packs_of_replica < stages:
        yield "fewer packs to a replica than pipeline stages: some stages always wait"


def check_memory(
    recipe: Recipe, report: DryRun, room: Room, *, device: Device | None = None
) -> None:
    """Check that a run fits its devices by the estimate.

    Raises:
        ConfigError: it does not; names the largest part and changes that would fit.
    """
    stages = [stage.memory for stage in report.stages]
    memory = max(stages, key=lambda memory: memory.device)
    if memory.device <= room.device:
        return
    parts = memory.parts()
    largest = max(parts, key=lambda name: parts[name])
    remedies = find_remedies(recipe, room, world_size=report.world_size, device=device)
    raise ConfigError(
        f"a rank of stage {stages.index(memory)} needs about {memory.device / GIB:.1f} GiB and a device has "
        f"{room.device / GIB:.1f}; the most is for {largest} ({parts[largest] / GIB:.1f} GiB): try "
        f"{name_remedies(remedies, timed=device is not None)}"
    )
