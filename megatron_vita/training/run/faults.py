"""Report of a step whose numbers a rule refuses: packs, samples, losses and gradients."""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vita.config.run_files import FAULTS, RECIPE
from megatron_vita.errors import DataError
from megatron_vita.files import atomic_write
from megatron_vita.training.run.guard import Action, Fault

if TYPE_CHECKING:
    from megatron_vita.training.metrics.metrics import StepMetrics
    from megatron_vita.training.run.run import Run

FORMAT_VERSION = 1
LISTED = 10
"""Parameters of a rank that a report lists: those whose gradients are not finite, or largest."""
logger = logging.getLogger(__name__)


class PackLoss(NamedTuple):
    """Sum of the losses of one pack's rows on one rank."""

    pack: int
    loss: Tensor
    rows: int


@dataclass(frozen=True, kw_only=True)
class FaultyPack:
    """A pack of a faulty step."""

    pack: int  # number in the plan, from 1
    loss: float  # per loss token, or per pair of answers (`dpo.beta`)
    loss_tokens: int  # or pairs
    samples: list[str]  # keys


@dataclass(frozen=True, kw_only=True)
class FaultReport:
    """A faulty step, the same on all ranks.

    loss, grad_norm: as the step would log them.
    gradients: largest magnitudes by rank and parameter, those that are not finite first, as the
        rank's buffer holds them. With a distributed optimizer, sums over all ranks are in the part
        of which the rank has the optimizer's state; elsewhere the rank's own gradients.
    are_clipped: they were multiplied by the factor that brings their norm to
        `optimizer.clip_grad`, which is 0 for an infinite norm.
    """

    step: int
    reason: str
    action: Action
    loss: float
    grad_norm: float
    packs: list[FaultyPack]
    gradients: dict[str, dict[str, float]]
    are_clipped: bool

    @property
    def worst(self) -> FaultyPack:
        """The pack whose loss is not finite, or highest."""
        return max(self.packs, key=lambda pack: _badness(pack.loss))

    def __str__(self) -> str:
        first = self.packs[0].pack
        worst = self.worst
        return (
            f"step {self.step}: {self.reason}, in packs {first} to {self.packs[-1].pack}; "
            f"pack {worst.pack} has loss {worst.loss:g}"
        )


def report_fault(
    run: "Run", fault: Fault, losses: Sequence[PackLoss], *, metrics: "StepMetrics"
) -> FaultReport:
    """Gather what the ranks know of the step that has just been computed. Collective.

    losses: of the packs, on the ranks that compute them.
    metrics: of the step.
    """
    mine = {
        "losses": [(pack, float(loss), rows) for pack, loss, rows in losses],
        "gradients": _largest_gradients(run),
    }
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    sums: dict[int, tuple[float, int]] = {}
    for pack, loss, rows in (item for theirs in gathered for item in theirs["losses"]):
        known_loss, known_rows = sums.get(pack, (0.0, 0))
        sums[pack] = (known_loss + loss, known_rows + rows)
    return FaultReport(
        step=metrics.step,
        reason=fault.reason,
        action=fault.action,
        loss=metrics.loss,
        grad_norm=metrics.grad_norm,
        packs=[_faulty_pack(run, pack, *sums[pack]) for pack in sorted(sums)],
        gradients={f"rank {rank}": theirs["gradients"] for rank, theirs in enumerate(gathered)},
        are_clipped=run.recipe.optimizer.clip_grad > 0,
    )


def _faulty_pack(run: "Run", pack: int, loss: float, rows: int) -> FaultyPack:
    samples = run.train_stream.keys_of(pack) if run.train_stream is not None else []
    return FaultyPack(pack=pack + 1, loss=loss / max(rows, 1), loss_tokens=rows, samples=samples)


def _largest_gradients(run: "Run") -> dict[str, float]:
    """Return the largest magnitude of the worst parameters' gradients on this rank."""
    found = {}
    for name, parameter in run.named_parameters():
        gradient = getattr(parameter, "main_grad", None)
        if gradient is not None:
            low, high = gradient.aminmax()  # without a copy of them, unlike abs()
            found[name] = torch.maximum(-low, high).float()
    if not found:
        return {}
    # In one copy: each one from the device waits for it.
    values = torch.stack(list(found.values())).tolist()
    ranked = sorted(zip(found, values, strict=True), key=lambda item: -_badness(item[1]))
    return dict(ranked[:LISTED])


def _badness(value: float) -> float:
    """Order numbers by size, with those that are not finite last."""
    return value if math.isfinite(value) else math.inf


def dump_path(folder: Path, step: int, *, pack: int) -> Path:
    """Return the file of a faulty step's report in a run's folder.

    pack: the step's first, from 1: after a rollback, the step has other packs.
    """
    return folder / FAULTS / f"step_{step:08d}_pack_{pack}.json"


def write_dump(report: FaultReport, folder: Path) -> Path:
    """Write a report to a run's folder for `vita data inspect --fault`, and return its path."""
    path = dump_path(folder, report.step, pack=report.packs[0].pack)
    path.parent.mkdir(parents=True, exist_ok=True)
    recipe = str((folder / RECIPE).absolute())
    head = {"format_version": FORMAT_VERSION, "time": time.time(), "recipe": recipe}
    text = json.dumps(_plain(head | dataclasses.asdict(report)), ensure_ascii=False, indent=1)
    with atomic_write(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    return path


def read_dump(path: Path) -> FaultReport:
    """Read a report that `write_dump` wrote.

    Raises:
        DataError: it cannot be read, is none, or has another format version.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found["format_version"]
        packs = [FaultyPack(**(pack | {"loss": float(pack["loss"])})) for pack in found["packs"]]
        gradients = {
            rank: {name: float(value) for name, value in values.items()}
            for rank, values in found["gradients"].items()
        }
        report = FaultReport(
            step=found["step"],
            reason=found["reason"],
            action=found["action"],
            loss=float(found["loss"]),
            grad_norm=float(found["grad_norm"]),
            packs=packs,
            gradients=gradients,
            are_clipped=found["are_clipped"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a report of a faulty step, RUN/{FAULTS}/step_N_pack_P.json: {error}"
        ) from error
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: format {version}, this version reads {FORMAT_VERSION}")
    return report


def _plain(value: Any) -> Any:
    """Return nested values with numbers that JSON has no form for as text: "nan", "inf"."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def sample_keys(packs: Iterable[FaultyPack]) -> list[str]:
    """Return the keys of all samples of packs, in order."""
    return [key for pack in packs for key in pack.samples]
