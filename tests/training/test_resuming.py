"""A resumed run follows the current recipe, and consumes each pack of its plan once."""

import dataclasses
import logging
import math
import subprocess
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.config import load_recipe
from megatron_vita.costs.memory.checkpoint_size import checkpoint_bytes
from megatron_vita.data.loading.ledger import Ledger
from megatron_vita.errors import CheckpointError, ConfigError
from megatron_vita.parallel.sharded_state import sharded_tensors
from megatron_vita.training.callbacks.watching import awaited_samples
from megatron_vita.training.dry_run import dry_run
from megatron_vita.training.loop import train
from megatron_vita.training.optimizer import optimizer
from megatron_vita.training.optimizer import shards as optimizer_shards
from megatron_vita.training.optimizer import state as optimizer_state
from megatron_vita.training.run.resume import ResumePoint, check_parts
from megatron_vita.training.run.run import Run, open_run
from megatron_vita.training.run.run_state import save_run
from megatron_vita.training.run.skipped import SkippedPacks, SkippedRange, write_skipped
from megatron_vita.training.run.streams import open_streams
from megatron_vita.training.step.batches import train_batches, validation_batches
from tests.forked import run_program
from tests.functional.toy_run import data_tools, make_toy_run

STEP = 8
PACKS = 32
QUIET = ["data.num_workers=0", "training.eval_interval=0"]


@pytest.fixture(scope="module", params=["distributed", "replicated"])
def halfway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a run of twelve steps that stands at the eighth."""
    platform.initialize_process()
    path = make_toy_run(tmp_path_factory.mktemp("halfway"))
    recipe = yaml.safe_load(path.read_text())
    recipe["parallel"] = {"use_distributed_optimizer": request.param == "distributed"}
    recipe["optimizer"] |= {"vision_lr_mult": 0.5, "vision_lr_decay": 0.9}
    path.write_text(yaml.safe_dump(recipe))
    train(load_recipe(path, [*QUIET, f"training.train_iters={STEP}"]))
    return path


def run_python(code: str, *arguments: str) -> str:
    """Last line that a program prints in a process of its own."""
    done = run_program("-c", code, *arguments)
    done.check_returncode()
    return done.stdout.splitlines()[-1]


def resumed(path: Path, *overrides: str) -> Run:
    run = open_run(load_recipe(path, [*QUIET, *overrides]))
    assert (run.step, run.consumed_packs) == (STEP, PACKS)
    return run


def test_rates_schedule_and_adams_constants_are_those_of_now(halfway: Path) -> None:
    changes = {
        "lr": 1e-3,
        "min_lr": 1e-4,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "adam_eps": 1e-7,
    }
    run = resumed(
        halfway,
        "training.train_iters=16",
        *(f"optimizer.{name}={value}" for name, value in changes.items()),
    )
    factors = {round(group["max_lr"] / 1e-3, 6) for group in run.optimizer.param_groups}
    assert factors == {1.0, round(0.5 * 0.9, 6), round(0.5 * 0.9**2, 6)}
    for group in run.optimizer.param_groups:
        peak = group["max_lr"]
        low = group["min_lr"]
        assert low == pytest.approx(peak / 10)
        assert group["lr"] == pytest.approx(
            low + (peak - low) * (1 + math.cos(math.pi * STEP / 16)) / 2
        )
        assert group["weight_decay"] == 0.1 * group["wd_mult"]
        assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-7)


def test_rates_of_a_run_left_as_it_is_do_not_move(halfway: Path) -> None:
    run = resumed(halfway, f"training.train_iters={STEP + 1}")
    first = open_run(
        load_recipe(halfway, [*QUIET, f"training.train_iters={STEP + 1}", "checkpoint.save=''"])
    )
    first.schedule.step(STEP)
    names = ("lr", "max_lr", "min_lr", "betas", "eps", "weight_decay", "wd_mult")
    for group, expected in zip(
        run.optimizer.param_groups, first.optimizer.param_groups, strict=True
    ):
        assert {name: group[name] for name in names} == {name: expected[name] for name in names}


def test_what_changed_is_logged_by_field(halfway: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        resumed(halfway, "optimizer.lr=0.001")
    assert (
        "resumed with changes: optimizer.lr 0.001 (was 0.003); training.train_iters 12 (was 8)"
        in caplog.text
    )


@pytest.mark.parametrize("field", ["vision_lr_mult", "vision_lr_decay"])
def test_rates_of_the_tower_cannot_come_to_relate_otherwise(halfway: Path, field: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"optimizer.{field} is 0.7, but 0\.\d in the run to be resumed"
    ):
        resumed(halfway, f"optimizer.{field}=0.7")


@pytest.mark.parametrize("part", ["vision_model", "projector", "language_model"])
def test_other_parts_cannot_come_to_be_trained(halfway: Path, part: str) -> None:
    with pytest.raises(
        CheckpointError,
        match=rf"training.freeze_{part} is True, but False in the run to be resumed",
    ):
        resumed(halfway, f"training.freeze_{part}=true")


@pytest.mark.parametrize("bf16", ["true", "false"])
def test_an_optimizers_state_that_was_written_for_other_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: str
) -> None:
    monkeypatch.setattr(optimizer, "BUCKET_SIZE", 3000)
    monkeypatch.setattr(optimizer, "BUCKET_SIZE_PER_RANK", 0)
    recipe = load_recipe(
        make_toy_run(tmp_path), [*QUIET, f"training.bf16={bf16}", "training.train_iters=1"]
    )
    train(recipe)
    run = open_run(recipe)
    padded = [
        bucket
        for bucket in run.chunks[0].buffers[0].buckets
        if len(bucket.grad_data) > bucket.numel_unpadded
    ]
    assert len(padded) > 1
    # What the run has saved with padded buckets is taken up; now as a save that misplaces it.
    own_states = optimizer_shards.own_states
    monkeypatch.setattr(
        optimizer_shards,
        "own_states",
        lambda *of: {key: values.roll(1) for key, values in own_states(*of).items()},
    )
    save_run(run)
    with pytest.raises(
        CheckpointError, match=r"step_00000001: the optimizer's weights are not those of the model"
    ):
        open_run(recipe)


def test_each_rank_writes_its_own_ranges_of_the_optimizers_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rectangles of at most 100 elements give the keys and values that megatron-core gathers."""
    monkeypatch.setattr(optimizer_shards, "MOST", 100)
    recipe = load_recipe(make_toy_run(tmp_path), [*QUIET, "training.train_iters=1"])
    train(recipe)
    checkpoint = Path(recipe.checkpoint.save) / "step_00000001"
    run = open_run(recipe)
    (part,) = optimizer_state._of_sharded(run.optimizer)
    model = store.model_state(run.unwrapped_models)
    gathered = part.sharded_param_state_fully_reshardable(model, False, store.sharding_metadata())
    states = [state for of in gathered.values() for state in of.values()]
    shards = {str(i): shard for i, shard in enumerate(sharded_tensors(states))}
    expected = {name: shard.data.clone() for name, shard in shards.items()}
    for shard in shards.values():
        shard.data.fill_(torch.nan)
    loaded = store.load_state(checkpoint, dict(shards))
    for name, shard in shards.items():
        assert torch.equal(loaded[name], expected[name]), shard.key
    assert max(values.numel() for values in expected.values()) > 1000


@pytest.mark.parametrize(
    "field", ["parallel.use_distributed_optimizer", "training.bf16", "model.text_only"]
)
def test_how_state_is_kept_and_computed_cannot_change(halfway: Path, field: str) -> None:
    saved = load_recipe(halfway)
    value = attrgetter(field)(saved)
    with pytest.raises(
        CheckpointError, match=rf"{field} is {not value}, but {value} in the run to be resumed"
    ):
        check_parts(saved, load_recipe(halfway, [f"{field}={str(not value).lower()}"]))


def test_state_that_could_not_be_saved_is_refused_at_the_start(
    halfway: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = "parallel.pipeline_model_parallel_size=2"
    frozen = "training.freeze_language_model=true"
    sharded = "parallel.use_distributed_optimizer=true"
    monkeypatch.setattr(optimizer_state, "HAVE_APEX_OR_TE", False)
    with pytest.raises(ConfigError, match="set use_distributed_optimizer to false"):
        optimizer_state.check_state_can_be_saved(load_recipe(halfway, [stages, frozen, sharded]))
    # Adapters of the first stage alone leave the second one without anything trained.
    adapters = [stages, frozen, sharded, "lora.rank=2"]
    with pytest.raises(ConfigError, match="set use_distributed_optimizer to false"):
        optimizer_state.check_state_can_be_saved(
            load_recipe(
                halfway,
                [*adapters, "lora.targets=[layers.0.*]", "training.freeze_vision_model=true"],
            )
        )
    for fine in (
        adapters,
        [stages, sharded],
        [frozen, sharded],
        [stages, frozen, "parallel.use_distributed_optimizer=false"],
    ):
        optimizer_state.check_state_can_be_saved(load_recipe(halfway, fine))
    monkeypatch.setattr(optimizer_state, "HAVE_APEX_OR_TE", True)
    optimizer_state.check_state_can_be_saved(load_recipe(halfway, [stages, frozen, sharded]))


def test_too_few_held_out_packs_for_the_replicas_are_refused_at_the_start(halfway: Path) -> None:
    recipe = load_recipe(halfway, ["data.num_workers=0"])
    resume = ResumePoint.find(recipe)
    about: dict[str, Any] = {"resume": resume, "skipped": SkippedPacks(), "tile_share": None}
    _, held_out = open_streams(recipe, **about, replicas=2)
    assert held_out is not None
    with pytest.raises(
        ConfigError, match=rf"data.validation holds {len(held_out)} packs.* each of 64 replicas"
    ):
        open_streams(recipe, **about, replicas=64)


def test_a_dry_run_shows_the_packs_that_are_next(halfway: Path) -> None:
    report = run_python(
        "import sys; from megatron_vita.config import load_recipe; from megatron_vita.training.dry_run import dry_run;"
        "report = dry_run(load_recipe(sys.argv[1]), world_size=1);"
        "print([pack.pack_id for pack in report.packs], len(report.step_costs))",
        str(halfway),
    )
    assert report == f"{list(range(PACKS, PACKS + 4))} 1"


def test_what_a_killed_save_left_is_removed_by_the_next(halfway: Path) -> None:
    run = resumed(halfway)
    left_behind = Path(run.recipe.checkpoint.save) / ".step_00000099.incomplete"
    left_behind.mkdir()
    save_run(run)
    assert not left_behind.exists()
    assert ResumePoint.find(run.recipe).step == STEP


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, on which 100 kB are left."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_save_on_a_full_disk_says_so_and_leaves_no_half(
    halfway: Path, full_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = resumed(halfway)
    run.recipe = run.recipe.replaced({"checkpoint.save": str(full_disk)})
    with pytest.raises(CheckpointError, match=r"no space for a checkpoint: .* bytes\) are free"):
        save_run(run)
    assert list(full_disk.iterdir()) == []
    with pytest.raises(CheckpointError, match=r"no space for a checkpoint: .*; nothing is left"):
        store.save_checkpoint(full_disk, step=8, state=_state(run), manifest={}, keep=1)
    assert list(full_disk.iterdir()) == []
    assert "Traceback" not in caplog.text


def _state(run: Run) -> dict:
    return {"model": store.model_state(run.unwrapped_models)}


def test_the_bytes_of_a_checkpoint_are_those_of_its_tensors(halfway: Path) -> None:
    recipe = load_recipe(halfway, [])
    folder = Path(recipe.checkpoint.save) / f"step_{STEP:08d}"
    tensors = [
        entry
        for entry in FileSystemReader(folder).read_metadata().state_dict_metadata.values()
        if isinstance(entry, TensorStorageMetadata)
    ]
    written = sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in tensors)
    assert checkpoint_bytes(recipe) == pytest.approx(written, rel=0.01)


def test_another_batch_size_goes_on_with_the_next_pack(halfway: Path) -> None:
    run = resumed(halfway, "training.global_batch_size=2")
    batches = train_batches(run)
    seen = [next(batches).pack_id for _ in range(2 * (12 - STEP))]
    batches.close()
    assert seen == list(range(PACKS, PACKS + 2 * (12 - STEP)))


def test_events_of_other_samples_than_the_plans_are_passed_over(halfway: Path) -> None:
    run = resumed(halfway)
    assert run.train_stream is not None
    event = run.train_stream.damage(PACKS, 0, "cut short")
    old = [event._replace(key="another"), event._replace(document=999), event._replace(pack=9999)]
    run.ledger = Ledger([event])
    noted = Path(run.recipe.checkpoint.save) / "damaged" / "replica_00099.jsonl"
    Ledger(path=noted).add(old)
    try:
        assert run.read_damage() == [event]
    finally:
        noted.unlink()


def test_a_plan_must_suffice_for_what_is_left(halfway: Path) -> None:
    packs = resumed(halfway).train_stream
    assert packs is not None
    most = STEP + (len(packs) - PACKS) // 2
    resumed(halfway, "training.global_batch_size=2", f"training.train_iters={most}")
    with pytest.raises(
        ConfigError, match=f"needs .* packs, but the plan .* holds {len(packs)}.* to {most}$"
    ):
        resumed(halfway, "training.global_batch_size=2", f"training.train_iters={most + 1}")


def test_packs_that_rollbacks_leave_out_are_counted_before_the_model_is_built(
    halfway: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resumed(halfway)
    assert run.train_stream is not None
    packs = len(run.train_stream)
    folder = Path(run.recipe.checkpoint.save)
    # Three packs are left out, and a fourth that fills no step before them.
    write_skipped(folder, SkippedRange(STEP + 1, PACKS + 1, PACKS + 4))
    most = STEP + (packs - PACKS - 4) // 2
    fields = ["training.global_batch_size=2", f"training.train_iters={most + 1}"]
    with monkeypatch.context() as patch:
        patch.setattr("megatron_vita.training.run.run.assemble_run", lambda recipe: 1 / 0)
        message = f"leave out, needs .* packs, but the plan .* holds {packs}.* to {most}$"
        with pytest.raises(ConfigError, match=message):
            resumed(halfway, *fields)
        with pytest.raises(ConfigError, match=message):
            dry_run(load_recipe(halfway, fields), world_size=1)
    (folder / "skipped_packs.jsonl").unlink()


@pytest.fixture
def plan(halfway: Path, tmp_path: Path) -> list[str]:
    """Overrides for a copy of the run's plan, which may be changed."""
    source = Path(load_recipe(halfway, []).data.plan)
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return [f"data.plan={tmp_path}"]


def test_a_plan_of_more_epochs_is_taken(halfway: Path, plan: list[str]) -> None:
    more = [*plan, "data.epochs=6"]
    data_tools("plan", halfway, *more)
    resumed(halfway, *more, "training.train_iters=15")


def test_a_plan_made_anew_is_refused(halfway: Path, plan: list[str]) -> None:
    anew = [*plan, "data.seed=99"]
    data_tools("plan", halfway, *anew)
    with pytest.raises(
        CheckpointError,
        match=rf"step_0+{STEP}: the {PACKS} packs that this run has consumed are not",
    ):
        resumed(halfway, *anew)


@pytest.mark.parametrize(("pack", "lost"), [(PACKS - 1, True), (PACKS, False), (PACKS + 1, False)])
def test_a_plan_is_continued_from_where_the_run_stands_or_later(
    halfway: Path, plan: list[str], pack: int, lost: bool
) -> None:
    dataset = dataclasses.asdict(load_recipe(halfway, []).data.train[0])
    two = (
        "data.train="
        + yaml.safe_dump([dataset | {"name": "new"}, dataset], default_flow_style=True).strip()
    )
    data_tools("plan", halfway, *plan, two, "--continue-from", str(pack))
    if lost:
        with pytest.raises(CheckpointError, match=f"vita data plan --continue-from {PACKS}"):
            resumed(halfway, *plan, two)
    else:
        resumed(halfway, *plan, two)


def test_the_samples_of_a_pack_that_does_not_come_are_known(halfway: Path) -> None:
    run = resumed(halfway, "training.eval_interval=4")
    batches = train_batches(run)
    try:
        for number in (1, 2):
            assert awaited_samples(run, number, held_out=False) == next(batches).sample_keys
    finally:
        batches.close()
    held_out, _ = validation_batches(run)
    try:
        assert awaited_samples(run, 1, held_out=True) == next(held_out).sample_keys
    finally:
        held_out.close()
