"""Callbacks see a run from its start to its end, add metrics, and fail in one line on all ranks."""

import logging
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml

from megatron_vita import platform
from megatron_vita.config import load_recipe, recipe_from_dict
from megatron_vita.errors import CallbackError, ConfigError, StoppedError, VitaError
from megatron_vita.training.callbacks import Callback
from megatron_vita.training.callbacks.importing import import_callbacks
from megatron_vita.training.loop import train
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.hooks import Hooks
from megatron_vita.training.run.run import Run
from tests.functional.launch import torchrun
from tests.functional.toy_run import QUICK, data_tools, toy_recipe

FAST = [*QUICK, "training.tensorboard_dir=''", "training.train_iters=3"]
DEMO = Path(__file__).parents[2] / "examples" / "easy_vqa" / "stage1.yaml"
HOOKS = [name for name in vars(Callback) if name.startswith(("on_", "before_", "after_"))]
MODULE = """
from megatron_vita.training.callbacks import Callback
from megatron_vita.training.run.hooks import Hooks

class Mine(Callback):
    def __init__(self, threshold=1.0):
        if threshold < 0:
            raise ValueError("below zero")
        self.threshold = threshold

class Other:
    pass
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "users_callbacks.py").write_text(MODULE)
    (folder / "users_broken.py").write_text("import a_package_that_is_not_there")
    return folder


class Watcher(Callback):
    """Notes the names of hooks as they are called; `note` may do more."""

    def __init__(self, **actions: Any) -> None:
        self.seen: list[str] = []
        for hook in HOOKS:
            setattr(self, hook, self._noting(hook, actions.get(hook)))

    def _noting(self, hook: str, action: Any) -> Any:
        def note(run: Run, *arguments: Any, **keywords: Any) -> None:
            step = "" if hook in ("on_losses", "on_log") else f" {run.step}"
            self.seen.append(hook + step)
            if action is not None:
                action(run, *arguments, **keywords)

        return note


def test_hooks_are_called_in_the_order_of_a_runs_events(recipe_path: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    fields = [
        *FAST,
        "training.train_iters=2",
        "training.eval_interval=2",
        f"checkpoint.save={tmp_path}",
    ]
    train(load_recipe(recipe_path, fields), callbacks=[watcher])
    packs = ["on_losses"] * 4
    assert watcher.seen == [
        *("on_start 0", "before_step 0", *packs, "after_step 1", "on_log"),
        *("before_step 1", *packs, "after_step 2", "on_log"),
        *("on_save 2", "on_validation 2", "on_log", "on_complete 2", "on_end 2"),
    ]


def divide(run: Run, *_: Any, **__: Any) -> None:
    if run.step == 1:
        raise ZeroDivisionError("division\nby zero")


@pytest.mark.parametrize("hook", ["before_step", "on_losses", "after_step", "on_log", "on_save"])
def test_a_hook_that_fails_ends_the_run_in_one_line_after_what_is_due(
    recipe_path: Path, tmp_path: Path, hook: str
) -> None:
    fields = [*FAST, f"checkpoint.save={tmp_path}", "checkpoint.save_interval=1"]
    if hook == "on_save":  # in the background it follows a later step
        fields.append("checkpoint.async_save=false")
    watcher = Watcher(**{hook: divide})
    other = Watcher()
    line = (
        rf"callback tests.training.test_callbacks.Watcher.{hook}, rank 0, step 1: ZeroDivisionError: "
        r"division by zero \(test_callbacks.py:\d+\)$"
    )
    with pytest.raises(CallbackError, match=line) as raised:
        train(load_recipe(recipe_path, fields), callbacks=[watcher, other])
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    last = int((tmp_path / "latest").read_text().removeprefix("step_"))
    assert other.seen[-3:] == [f"on_save {last}", f"on_error {last}", f"on_end {last}"]
    assert last in (1, 2)  # what fails after saving is heard of with the next step
    assert watcher.seen[-2:] == other.seen[-2:]


def test_the_last_step_does_not_hide_an_error_in_what_follows_it(recipe_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no connection")

    for hook in ("on_log", "on_end", "on_start"):
        watcher = Watcher(**{hook: fail})
        fields = [*FAST, "training.train_iters=1"]
        with pytest.raises(CallbackError, match=f"Watcher.{hook}, .* no connection"):
            train(load_recipe(recipe_path, fields), callbacks=[watcher])
        if hook != "on_end":
            assert [name.split()[0] for name in watcher.seen[-2:]] == ["on_error", "on_end"]


def test_a_run_that_stops_tells_callbacks_and_not_of_an_error(
    recipe_path: Path, tmp_path: Path
) -> None:
    def stop(run: Run) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    watcher = Watcher(before_step=stop)
    fields = [*FAST, f"checkpoint.save={tmp_path}"]
    with pytest.raises(StoppedError):
        train(load_recipe(recipe_path, fields), callbacks=[watcher])
    assert watcher.seen[-3:] == ["on_save 1", "on_stop 1", "on_end 1"]


def test_an_error_at_the_end_does_not_hide_the_one_before(
    recipe_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def close(*_: Any) -> None:
        raise OSError("disk is gone")

    monkeypatch.setattr(platform, "set_up_logging", lambda _: None)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(CallbackError, match="division by zero"),
    ):
        train(
            load_recipe(recipe_path, FAST),
            callbacks=[Watcher(after_step=divide, on_end=close), Watcher()],
        )
    assert "Watcher.on_end, rank 0, step 1: OSError: disk is gone" in caplog.text


def test_an_error_that_ends_the_run_does_not_hide_one_of_a_hook_before(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Fails(Callback):
        def on_fault(self, run: Run, report: Any) -> None:
            raise OSError("disk is full")

    platform.initialize_process()
    with caplog.at_level(logging.WARNING), pytest.raises(VitaError, match="diverged"):
        _end_in_fault(Hooks(cast(Run, SimpleNamespace(step=3)), [Fails()]))
    (line,) = caplog.messages
    assert "Fails.on_fault, rank 0, step 3: OSError: disk is full" in line
    # As the cause of the error, it is in its message.
    caplog.clear()
    cause = VitaError("disk is full")
    hooks = Hooks(cast(Run, SimpleNamespace(step=3)), [])
    hooks._keep(cause, Fails(), "on_fault")
    error = CallbackError("disk is full")
    error.__cause__ = cause
    hooks._end_failed(error)
    assert not caplog.messages


def _end_in_fault(hooks: Hooks) -> None:
    with hooks:
        hooks.call("on_fault", None)
        raise VitaError("the run diverged")


def test_a_callback_of_the_working_folder_is_built_with_its_arguments(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(module)
    entries = "[users_callbacks.Mine, {path: users_callbacks.Mine, arguments: {threshold: 2.5}}]"
    recipe = recipe_from_dict({}, [f"training.callbacks={entries}"])
    first, second = import_callbacks(recipe.training.callbacks)
    assert (first.threshold, second.threshold) == (1.0, 2.5)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("Mine", "path is 'Mine': my_module.MyCallback is needed"),
        ("users_callback.Mine", "no module users_callback: neither installed nor in the working"),
        ("users_broken.Mine", "its module needs a_package_that_is_not_there"),
        ("users_callbacks.Mime", r"users_callbacks.py has no Mime; did you mean Mine\?"),
        ("users_callbacks.Other", "not a class derived from megatron_vita.training.callbacks"),
        ("{path: users_callbacks.Mine, arguments: {x: 3}}", "unexpected keyword argument 'x'"),
        ("{path: users_callbacks.Mine, arguments: {threshold: -1}}", "ValueError: below zero"),
        ("{path: users_callbacks.Mine, arguments: [3]}", "arguments is .*: a mapping is needed"),
    ],
)
def test_a_callback_that_cannot_be_built_is_refused_by_its_path(
    module: Path, monkeypatch: pytest.MonkeyPatch, entry: str, message: str
) -> None:
    monkeypatch.chdir(module)
    with pytest.raises(ConfigError, match=message):
        import_callbacks(recipe_from_dict({}, [f"training.callbacks=[{entry}]"]).training.callbacks)


def test_two_stages_record_on_some_ranks_and_end_together(recipe_path: Path) -> None:
    ended = torchrun("callbacks_worker.py", str(recipe_path), processes=2, seconds=120)
    recorded = [
        "('mine/all', 2.0)", "('mine/last_stage', 0.0)", "('mine/losses_on', 1.0)",
    ]  # fmt: skip
    with_first = [recorded[0], "('mine/first_rank', 7.0)", *recorded[1:]]
    expected = [
        *(
            f"step {step} [{', '.join(with_first if step == 2 else recorded)}]"
            for step in (1, 2, 3)
        ),
        "CallbackError: callback __main__.Fails.after_step, rank 1, step 1: ValueError: "
        "on one rank (callbacks_worker.py)",
        "ConfigError: callbacks of train: rank 1 has ",
        "ConfigError: metric mine/way: rank 1 reduces it by sum, a rank before it by max",
    ]
    for rank in (0, 1):
        prefix = f"rank {rank}: "
        found = [line for line in ended.stdout.splitlines() if line.startswith(prefix)]
        assert len(found) == len(expected), found
        for line, start in zip(found, expected, strict=True):
            assert line.startswith(prefix + start), line


class Busy(Callback):
    """Does in each hook what a user's callback may do."""

    def on_losses(self, run: Run, losses: torch.Tensor, **_: Any) -> None:
        run.record("mine/loss", losses.mean(), weight=len(losses))

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        run.record("mine/most", metrics.tokens, reduce="max")


@pytest.fixture
def demo_path(recipe_path: Path) -> Path:
    """A recipe of the demo's model and pack length on the toy data, with an index and a plan."""
    folder = recipe_path.parent
    recipe = toy_recipe(folder)
    demo = yaml.safe_load(DEMO.read_text())
    recipe["model"] = demo["model"]
    recipe["media"] = demo["media"]
    recipe["data"] |= {"seq_length": demo["data"]["seq_length"], "plan": str(folder / "demo_plan")}
    recipe["data"] |= {"epochs": 20, "validation": []}
    path = folder / "demo.yaml"
    path.write_text(yaml.safe_dump(recipe))
    data_tools("index", path)
    data_tools("plan", path)
    return path


@pytest.mark.alone
def test_hooks_and_writers_take_less_than_a_hundredth_of_a_demo_step(
    demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "set_up_logging", lambda _: None)
    in_hooks: list[float] = []  # seconds of each step
    steps: list[float] = []
    depth = 0
    call = Hooks.call

    def timed(hooks: Hooks, hook: str, *arguments: Any, **keywords: Any) -> None:
        nonlocal depth
        began = time.thread_time()  # other programs do not count
        if hook == "before_step":
            in_hooks.append(0.0)
            steps.append(-began)
        depth += 1
        call(hooks, hook, *arguments, **keywords)
        depth -= 1
        now = time.thread_time()
        if depth == 0 and steps:  # writers are called from within another hook
            in_hooks[-1] += now - began
        if hook == "after_step":
            steps[-1] += now

    monkeypatch.setattr(Hooks, "call", timed)
    fields = [
        *FAST,
        "training.train_iters=20",
        "training.log_interval=5",  # the demo's, with one pack a rank and step
        "training.global_batch_size=1",
        f"training.run_dir={tmp_path / 'run'}",
        f"training.tensorboard_dir={tmp_path / 'tensorboard'}",
    ]
    train(load_recipe(demo_path, fields), callbacks=[Busy()])
    assert len(steps) == 20
    # The first ones compile and allocate.
    assert sum(in_hooks[5:]) < 0.01 * sum(steps[5:]), (in_hooks, steps)


def test_a_callback_may_end_a_run_which_saves_after_the_next_step(
    recipe_path: Path, tmp_path: Path
) -> None:
    def ask(run: Run, metrics: StepMetrics) -> None:
        if run.step == 1:
            run.request_stop("the loss no longer falls")
            run.request_stop("a later reason")

    watcher = Watcher(after_step=ask)
    fields = [*FAST, "training.train_iters=4", f"checkpoint.save={tmp_path}"]
    line = r"told to stop \(the loss no longer falls\) after step 2 of 4: saved"
    with pytest.raises(StoppedError, match=line):
        train(load_recipe(recipe_path, fields), callbacks=[watcher])
    assert (tmp_path / "latest").read_text() == "step_00000002"
    assert watcher.seen[-3:] == ["on_save 2", "on_stop 2", "on_end 2"]
