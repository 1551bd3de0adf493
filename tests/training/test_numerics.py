"""Rules for NaN, infinities and spikes: what they refuse, and what is left of such a step."""

import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from data_tools.cli import app
from megatron_vita import platform
from megatron_vita.cli.replay import replay_run
from megatron_vita.config import NumericsConfig, load_recipe
from megatron_vita.errors import DataError, VitaError
from megatron_vita.training.callbacks import Callback
from megatron_vita.training.loop import train
from megatron_vita.training.run.faults import read_dump
from megatron_vita.training.run.guard import Guard
from megatron_vita.training.run.resume import ResumePoint
from megatron_vita.training.run.run import Run, open_run
from megatron_vita.training.step.step import normalize, train_step
from tests.functional.layout_worker import my_batches, open_layout
from tests.functional.poison import KINDS, Poison, check_skips
from tests.functional.rollback_runs import Spoils

FAST = ["data.num_workers=0", "training.eval_interval=0", "training.train_iters=3"]


def guard_of(**rules: Any) -> Guard:
    return Guard(NumericsConfig(**rules))


def test_a_spike_is_what_exceeds_the_mean_by_the_deviations_of_the_rule() -> None:
    # Mean 2.5, standard deviation sqrt(1.25).
    limit = 2.5 + 2 * math.sqrt(1.25)
    for value, is_spike in ((limit - 0.01, False), (limit + 0.01, True)):
        guard = guard_of(spike_action="stop", rolling_interval_length=4, sigma_factor=2.0)
        assert not any(guard.judge(1.0, norm) for norm in (9.0, 1.0, 2.0, 3.0, 4.0))
        fault = guard.judge(1.0, value)
        assert (fault is not None) == is_spike
    assert fault is not None
    assert fault.action == "stop"
    assert "gradient norm 4.74607, above 4.73607 (mean 2.5 of 4 steps" in fault.reason


def test_a_loss_is_judged_like_a_gradient_norm() -> None:
    guard = guard_of(spike_action="skip", rolling_interval_length=2, sigma_factor=1.0)
    assert not any(guard.judge(loss, 1.0) for loss in (1.0, 2.0))
    fault = guard.judge(3.0, 1.0)
    assert fault is not None
    assert fault.reason.startswith("loss 3, above 2 ")


def test_nothing_is_a_spike_before_half_of_the_steps_are_known() -> None:
    guard = guard_of(spike_action="skip", rolling_interval_length=8)
    assert not any(guard.judge(10.0**i, 1.0) for i in range(4))
    assert guard.judge(10.0**9, 1.0)


def test_a_level_that_has_risen_for_good_is_normal_after_a_while() -> None:
    guard = guard_of(spike_action="skip", rolling_interval_length=4)
    faults = [guard.judge(loss, 1.0) is not None for loss in (1.0, 1.0, 1.0, 1.0, *[9.0] * 6)]
    assert faults == [False] * 4 + [True] + [False] * 5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_finite_is_refused_and_not_compared_with(value: float, place: int) -> None:
    numbers = [1.0, 1.0]
    numbers[place] = value
    for rule in ("stop", "skip"):
        guard = guard_of(nonfinite_action=rule)
        fault = guard.judge(*numbers)
        assert fault is not None
        assert fault.action == rule
        assert guard.state()["losses"] == []


def test_steps_skipped_in_a_row_stop_a_run_at_their_limit() -> None:
    guard = guard_of(nonfinite_action="skip", max_consecutive_skips=2)
    actions = []
    for loss in (math.nan, math.nan, 1.0, math.nan, math.nan, math.nan):
        fault = guard.judge(loss, 1.0)
        actions.append(fault.action if fault else "")
    assert actions == ["skip", "skip", "", "skip", "skip", "stop"]


def test_a_guard_that_is_loaded_judges_as_the_one_that_was_saved() -> None:
    rules = {"spike_action": "skip", "rolling_interval_length": 4, "max_consecutive_skips": 1}
    first = guard_of(**rules)
    for loss in (1.0, 1.1, 0.9, 1.0, 8.0):
        first.judge(loss, 1.0)
    second = guard_of(**rules)
    second.load(json.loads(json.dumps(first.state())))
    faults = [guard.judge(1e6, 1.0) for guard in (first, second)]
    assert faults[0] == faults[1]
    assert faults[0] is not None
    assert faults[0].action == "stop"


def test_a_skipped_step_leaves_weights_and_optimizer_bit_equal() -> None:
    platform.initialize_process()
    for distributed in (True, False):
        check_skips({"use_distributed_optimizer": distributed}, KINDS)
    check_skips({"bf16": True}, KINDS[:1])


def test_rules_cost_no_reduction_and_one_where_steps_are_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    platform.initialize_process()
    count = 0
    all_reduce = dist.all_reduce

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        count += 1
        return all_reduce(*arguments, **keywords)

    monkeypatch.setattr(dist, "all_reduce", counted)
    counts = []
    for rules in ({}, {"spike_action": "stop"}, {"nonfinite_action": "skip"}):
        run = open_layout(dict(rules), None)
        train_step(run, iter(my_batches(run, 0)))  # ranks agree on names of metrics
        count = 0
        train_step(run, iter(my_batches(run, 0)))
        counts.append(count)
    assert counts == [counts[0], counts[0], counts[0] + 1]


class FindsPack(Callback):
    """Notes the pack whose losses are not finite."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def on_losses(self, run: Run, losses: torch.Tensor, *, batch: Any, pack: Any) -> None:
        if not losses.isfinite().all():
            self.found.append(batch.pack_id + 1)


@pytest.fixture(scope="module")
def skipped(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FindsPack]:
    """The folder of a run whose second step was skipped for one pack's NaN."""
    folder = tmp_path_factory.mktemp("skipped")
    calls = 0
    is_spoilt = False

    def spoil(tiles: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        nonlocal calls, is_spoilt
        calls += 1
        pixels = normalize(tiles, *arguments, **keywords)
        if calls > 4 and len(tiles) and not is_spoilt:
            is_spoilt = True
            return pixels * math.nan
        return pixels

    finder = FindsPack()
    fields = [*FAST, "numerics.nonfinite_action=skip", f"checkpoint.save={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_vita.training.step.step.normalize", spoil)
        train(load_recipe(recipe_path, fields), callbacks=[finder])
    return folder, finder


def rows_of(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


def test_a_faulty_step_is_an_event_with_packs_and_samples(
    skipped: tuple[Path, FindsPack], recipe_path: Path
) -> None:
    folder, _ = skipped
    (event,) = rows_of(folder, "fault")
    assert (event["step"], event["action"]) == (2, "skip")
    assert event["packs"] == [5, 6, 7, 8]
    stream = open_run(load_recipe(recipe_path, [*FAST, "checkpoint.save=''"])).train_stream
    assert stream is not None
    assert event["samples"] == [key for pack in range(4, 8) for key in stream.keys_of(pack)]
    steps = rows_of(folder, "step")
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert [row.get("train/skipped") for row in steps] == [None, 1.0, None]
    assert [row["train/loss"] is None for row in steps] == [False, True, False]


def test_the_dump_names_the_pack_and_inspect_shows_it(
    skipped: tuple[Path, FindsPack],
) -> None:
    folder, finder = skipped
    (pack,) = finder.found
    dump = folder / "faults" / "step_00000002_pack_5.json"
    report = read_dump(dump)
    assert report.worst.pack == pack
    assert [math.isnan(found.loss) for found in report.packs] == [
        found.pack == pack for found in report.packs
    ]
    assert all(math.isnan(value) for value in report.gradients["rank 0"].values())
    result = CliRunner().invoke(app, ["inspect", str(folder / "recipe.yaml"), "--fault", str(dump)])
    assert result.exit_code == 0, result.output
    assert f"step 2: loss nan, gradient norm nan, in packs 5 to 8; pack {pack}" in result.output
    assert f"train pack {pack}" in result.output


def test_a_file_that_is_no_report_is_refused_by_name(tmp_path: Path) -> None:
    for text in ("", "[]", '{"format_version": 1}', '{"format_version": 9, "packs": []}'):
        (tmp_path / "dump.json").write_text(text)
        with pytest.raises(DataError, match=r"dump.json: "):
            read_dump(tmp_path / "dump.json")


def test_a_resumed_run_compares_with_the_steps_before(
    skipped: tuple[Path, FindsPack], recipe_path: Path
) -> None:
    folder, _ = skipped
    recipe = load_recipe(recipe_path, [*FAST, f"checkpoint.save={folder}"])
    losses = [row["train/loss"] for row in rows_of(folder, "step") if row["train/loss"]]
    saved = ResumePoint.find(recipe).numerics
    assert saved["losses"] == pytest.approx(losses)
    assert open_run(recipe).guard.state() == saved


def test_a_run_that_stops_for_a_spike_completes_the_save_of_the_step_before(
    recipe_path: Path, tmp_path: Path
) -> None:
    fields = [
        *FAST,
        "numerics.spike_action=stop",
        "numerics.rolling_interval_length=2",
        "numerics.sigma_factor=100",
        f"checkpoint.save={tmp_path}",
        "checkpoint.save_interval=1",
    ]

    with pytest.raises(VitaError, match=r"step 3: .*norm .*, above .* packs 9 "):
        train(load_recipe(recipe_path, fields), callbacks=[Spoils(step=3, factor=1e6)])
    assert (tmp_path / "latest").read_text() == "step_00000002"


def test_a_report_has_gradients_after_clipping(recipe_path: Path) -> None:
    reports = []
    for clip in (1.0, 0.0):
        fields = {"spike_action": "stop", "rolling_interval_length": 2, "sigma_factor": 50.0}
        run = open_layout(fields | {"clip_grad": 1.0}, None)
        poison = Poison(run, rank=0)
        for _ in range(2):
            train_step(run, iter(my_batches(run, 0)))
        for part in (run.optimizer, *run.optimizer.chained_optimizers):
            part.config.clip_grad = clip
        run.hooks = Mock(has_failed=False)
        poison.spoil(factor=1e6)
        with pytest.raises(VitaError, match="step 3"):
            train_step(run, iter(my_batches(run, 0)))
        calls = [call.args for call in run.hooks.call.call_args_list]
        (report,) = (arguments[0] for name, *arguments in calls if name == "on_fault")
        reports.append(report)
    clipped, whole = reports
    assert clipped.are_clipped
    assert clipped.grad_norm == pytest.approx(whole.grad_norm)
    factor = 1.0 / whole.grad_norm
    expected = {name: factor * value for name, value in whole.gradients["rank 0"].items()}
    assert clipped.gradients["rank 0"] == pytest.approx(expected, rel=1e-4)


def test_the_step_that_stopped_a_run_is_replayed(recipe_path: Path, tmp_path: Path) -> None:
    fields = [
        *FAST,
        "numerics.spike_action=stop",
        "numerics.rolling_interval_length=2",
        "numerics.sigma_factor=1",
        "optimizer.lr=1",
        "optimizer.lr_warmup_fraction=0",
        f"checkpoint.save={tmp_path}",
        "checkpoint.save_interval=2",
    ]
    with pytest.raises(VitaError, match=r"step 3: .*, above .* packs 9 "):
        train(load_recipe(recipe_path, fields))
    replay_run(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    (event,) = rows_of(tmp_path, "fault")
    changed = json.dumps(event | {"train/loss": math.nextafter(event["train/loss"], 0.0)})
    path.write_text(path.read_text().replace(json.dumps(event), changed))
    with pytest.raises(VitaError, match=r"steps 3 to 3 were replayed; not as logged: 3$"):
        replay_run(tmp_path, 3)
