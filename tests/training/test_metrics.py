"""Metrics are reduced over ranks as asked, cost little, and count what a step computes."""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vita import platform
from megatron_vita.config import TrainingConfig, load_recipe
from megatron_vita.costs.flops import pack_flops, training_flops
from megatron_vita.errors import ConfigError
from megatron_vita.parallel import groups
from megatron_vita.training import loop
from megatron_vita.training.callbacks.tensorboard import TensorBoardCallback
from megatron_vita.training.loop import train
from megatron_vita.training.metrics.meter import Meter
from megatron_vita.training.metrics.metrics import count_batch, measure_memory
from megatron_vita.training.metrics.wording import count
from megatron_vita.training.run.run import Run, assemble_run
from tests.functional.synthetic import make_pack, tiny_recipe
from tests.functional.toy_run import QUICK

FAST = [*QUICK, "training.tensorboard_dir=''", "training.train_iters=3"]


class Ranks:
    """Two ranks as threads of this process, whose collectives meet at a barrier."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.barrier = threading.Barrier(2, timeout=10)
        self.shared = [None, None]
        self.collectives = 0
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)
        monkeypatch.setattr(dist, "all_gather_object", self.all_gather_object)

    def exchange(self, value: Any) -> list[Any]:
        rank = int(threading.current_thread().name)
        self.shared[rank] = value
        self.barrier.wait()
        found = list(self.shared)
        self.barrier.wait()
        self.collectives += rank == 0
        return found

    def all_reduce(self, vector: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        both = torch.stack(self.exchange(vector.clone()))
        vector.copy_(both.sum(0) if op == dist.ReduceOp.SUM else both.max(0).values)

    def all_gather_object(self, gathered: list[Any], value: Any) -> None:
        gathered[:] = self.exchange(dict(value))

    def run(self, *work: Callable[[], Any]) -> list[Any]:
        """Results of the work on each rank."""
        results: list[Any] = [None, None]

        def call(rank: int) -> None:
            results[rank] = work[rank]()

        threads = [threading.Thread(target=call, args=(i,), name=str(i)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def test_values_are_reduced_over_ranks_by_whichever_ranks_add_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = Ranks(monkeypatch)
    meters = (Meter(), Meter())

    def first() -> dict[str, float]:
        meters[0].add("both", 1)
        meters[0].add("both", 2)
        meters[0].add("average", 1.0, reduce="mean")
        meters[0].add("high", -5.0, reduce="max")
        meters[0].add("low", torch.tensor(7.0), reduce="min")
        meters[0].add("low", torch.tensor(8.0), reduce="min")
        return meters[0].reduce()

    def second() -> dict[str, float]:
        meters[1].add("both", torch.tensor(10.0))
        meters[1].add("average", 2.0, reduce="mean")
        meters[1].add("average", 6.0, reduce="mean")
        meters[1].add("high", -4.0, reduce="max")
        meters[1].add("alone", 3, reduce="max")
        return meters[1].reduce()

    expected = {"both": 13.0, "average": 3.0, "high": -4.0, "low": 7.0, "alone": 3.0}
    assert ranks.run(first, second) == [expected, expected]
    # a name that nobody adds is left out, one that is known costs no exchange of names
    ranks.collectives = 0
    meters[1].add("alone", 4, reduce="max")
    assert ranks.run(meters[0].reduce, meters[1].reduce) == [{"alone": 4.0}] * 2
    assert ranks.collectives == 2


def test_a_name_that_is_reduced_in_two_ways_is_our_mistake() -> None:
    meter = Meter()
    meter.add("name", 1)
    with pytest.raises(AssertionError, match="metric name is reduced by sum elsewhere, by max"):
        meter.add("name", 1, reduce="max")


def test_time_is_that_of_the_rank_that_waited_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch)
    meters = (Meter(), Meter())

    def wait(meter: Meter, seconds: float) -> dict[str, float]:
        for _ in range(2):
            with meter.timing("waiting"):
                time.sleep(seconds)
        return meter.reduce()

    found = ranks.run(lambda: wait(meters[0], 0.0), lambda: wait(meters[1], 0.05))
    assert found[0] == found[1]
    assert 0.1 <= found[0]["waiting"] < 0.5


@pytest.mark.alone
def test_counting_and_reducing_take_less_than_half_a_percent_of_a_second() -> None:
    platform.initialize_process()
    recipe = tiny_recipe()
    groups.initialize_groups(recipe.parallel)
    meter = Meter()
    batch = make_pack([(31, 2), (1, 0), (45, 5)], seed=1)
    seconds = []
    for _ in range(20):
        start = time.process_time()  # other programs on the machine do not count
        count_batch(meter, batch, recipe)
        measure_memory(meter)
        meter.reduce()
        seconds.append(time.process_time() - start)
    assert sorted(seconds)[10] < 0.005


def test_model_flops_of_training_are_three_times_the_forward_where_all_is_trained() -> None:
    recipe = tiny_recipe()
    load = {"tiles": 7, "loss_tokens": 20}
    forward = pack_flops(recipe, [48, 16], **load)
    assert training_flops(recipe, [48, 16], **load).total == 3 * forward
    joined = tiny_recipe(isolate_documents=False)
    more = training_flops(joined, [48, 16], **load).attention
    assert more == 3 * 2 * 64**2 * 4 * 4 * 8  # one segment; 4 layers of 4 heads of 8


def test_frozen_parts_count_only_what_gradients_pass_through() -> None:
    load: dict[str, Any] = {"lengths": [64], "tiles": 7, "loss_tokens": 20}
    whole = training_flops(tiny_recipe(), **load)
    language = training_flops(tiny_recipe(freeze_language_model=True), **load)
    assert language.linear * 3 == whole.linear * 2
    assert language.output * 3 == whole.output * 2
    assert language.attention == whole.attention  # has no weights
    tower = training_flops(tiny_recipe(freeze_vision_model=True), **load)
    both = training_flops(tiny_recipe(freeze_vision_model=True, freeze_projector=True), **load)
    assert whole.vision > tower.vision > both.vision
    assert both.vision * 3 == whole.vision
    assert training_flops(tiny_recipe(text_only=True), **load).vision == 0


def test_a_batch_counts_documents_with_their_padding_and_no_tail() -> None:
    platform.initialize_process()
    recipe = tiny_recipe()
    groups.initialize_groups(recipe.parallel)
    batch = make_pack([(31, 2), (45, 5)], seed=2)
    meter = Meter()
    count_batch(meter, batch, recipe)
    found = meter.reduce()
    rows = int((batch.labels != -100).sum())
    flops = training_flops(recipe, [32, 48], tiles=7, loss_tokens=rows)
    assert (found["flops"], found["vision_flops"]) == (flops.total, flops.vision)
    assert (found["tokens"], found["positions"]) == (76, 128)


def test_speed_memory_and_waiting_are_in_the_log_and_in_tensorboard(
    recipe_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(platform, "set_up_logging", lambda _: None)
    monkeypatch.setattr(platform, "measure_matmul", lambda: 1e9)
    recipe = load_recipe(recipe_path, [*FAST, f"training.tensorboard_dir={tmp_path}"])
    runs = []

    def open_with_metric(recipe: Any) -> Run:
        runs.append(open_run(recipe))
        runs[0].meter.add("mine/first_step", 7)
        runs[0].record("mine/recorded", torch.tensor([5.0]))
        return runs[0]

    open_run = loop.open_run
    monkeypatch.setattr(loop, "open_run", open_with_metric)
    with caplog.at_level(logging.INFO):
        train(recipe)
    (line,) = [r.getMessage() for r in caplog.records if "step 3/3" in r.getMessage()]
    for part in ("tokens/s/GPU", "TFLOP/s/GPU (", "%), vision ", "host ", "data 0.", "left"):
        assert part in line
    events = EventAccumulator(str(tmp_path))
    events.Reload()

    def values(tag: str) -> list[float]:
        return [event.value for event in events.Scalars(tag)]

    assert values("mine/first_step") == [7.0]
    assert values("mine/recorded") == [5.0]
    assert [r.getMessage() for r in caplog.records if "mine/recorded 5" in r.getMessage()]
    seconds = values("speed/step_seconds")
    rates = values("speed/tflops_per_gpu")
    shares = values("speed/matmul_share")
    assert shares == pytest.approx([rate * 1e12 / 1e9 for rate in rates])
    waits = values("speed/data_seconds")
    assert all(0 < wait < step for wait, step in zip(waits, seconds, strict=True))
    assert all(0 < share < 1 for share in values("speed/vision_share"))
    assert all(gib > 0.1 for gib in values("memory/host_gib"))
    assert values("speed/tokens_per_second") == values("speed/tokens_per_second_per_gpu")


def test_tensorboard_shows_steps_that_are_done_again_once(tmp_path: Path) -> None:
    platform.initialize_process()
    callback = TensorBoardCallback(str(tmp_path), step=0)
    run: Any = SimpleNamespace(step=2)

    def log(steps: range, loss: float) -> None:
        metrics: Any = SimpleNamespace(held_out=True, scalars=lambda: {"train/loss": loss})
        for metrics.step in steps:
            callback.on_log(run, metrics)

    log(range(1, 5), 1.0)
    callback.on_rollback(run, 5)
    log(range(3, 4), 2.0)
    callback.on_end(run)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_run_begins_with_what_it_runs_on_and_how(
    recipe_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "set_up_logging", lambda _: None)
    fields = ["training.recompute_vision=true", "training.freeze_vision_model=true"]
    with caplog.at_level(logging.INFO):
        train(load_recipe(recipe_path, [*FAST, *fields]))
    lines = [record.getMessage() for record in caplog.records]
    lines = lines[: next(i for i, line in enumerate(lines) if line.startswith("step 1"))]
    run = assemble_run(load_recipe(recipe_path, FAST))
    numbers = {
        part: sum(
            p.numel() for n, p in run.unwrapped_model.named_parameters() if n.startswith(part)
        )
        for part in ("", "vision_model")
    }
    expected = (
        f"megatron_vita 0.1.0, torch {torch.__version__}, megatron-core 0.19.2",
        "1 x CPU",
        "layout of 1 ranks: TP 1 x CP 1 x DP 1 x PP 1, distributed optimizer",
        f"parameters: {count(numbers[''])}, trained "
        f"{count(numbers[''] - numbers['vision_model'])}, frozen "
        f"{count(numbers['vision_model'])}; at most {count(numbers[''])} on a rank",
        "estimated memory of a rank: peak ",
        "levers: recompute_vision True",
    )
    for start in expected:
        assert any(line.startswith(start) for line in lines), (start, lines)


def test_a_profile_covers_the_steps_asked_for_and_survives_a_failure(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = [
        *FAST,
        "training.profile_step_start=2",
        "training.profile_step_end=2",
        f"training.profile_dir={tmp_path / 'profiles'}",
    ]
    recipe = load_recipe(recipe_path, fields)
    train(recipe)
    trace = tmp_path / "profiles" / "steps_2_to_2_rank_0.trace.json.gz"
    assert trace.stat().st_size > 1000
    trace.unlink()

    def fail(run: Run, batches: Any) -> Any:
        if run.step == 1:
            raise RuntimeError("no memory is left")
        return train_step(run, batches)

    train_step = loop.train_step
    monkeypatch.setattr(loop, "train_step", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        train(recipe)
    assert trace.exists()
    trace.unlink()
    train(dataclasses.replace(
        recipe, training=dataclasses.replace(recipe.training, profile_ranks=[1], train_iters=1)
    ))  # fmt: skip
    assert not trace.exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"profile_step_start": 3, "profile_dir": "x"}, "start is 3 and profile_step_end 0"),
        ({"profile_step_start": 1, "profile_step_end": 2}, "needs training.profile_dir"),
        ({"profile_step_end": 2}, "needs training.profile_step_start"),
        ({"profile_step_start": -1}, "profile_step_start is -1: it must be at least 0"),
    ],
)
def test_a_profile_that_cannot_be_is_refused_by_field(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**fields)
