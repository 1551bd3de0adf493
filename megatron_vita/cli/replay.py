"""vita replay: train up to a logged step again, and compare with the log bit for bit.

The run's newest whole checkpoint before the step is loaded; nothing is written to the run's folder. As
many ranks are needed as the run had: python -m megatron_vita.launch --standalone --nproc_per_node RANKS
-m megatron_vita replay RUN --step N. The exit code is 1 if a step's loss or gradient norm differs.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vita.config import Recipe, load_recipe
from megatron_vita.config.run_files import RECIPE
from megatron_vita.errors import ConfigError, VitaError
from megatron_vita.report.reading import Row, RunRecord, read_run
from megatron_vita.supervise.rank_failure import report_failure
from megatron_vita.training.run.run_folder import earlier_ends, earlier_recipe

if TYPE_CHECKING:
    from megatron_vita.training.replay import LoggedStep


@dataclass(frozen=True, kw_only=True)
class ReplayedRun:
    """A run's records, as far as a replay of one of its steps needs them."""

    record: RunRecord
    recipe: Recipe  # that the step was done with
    checkpoints: Path
    step: int

    def check(self, first: int, *, ranks: int) -> None:
        """Check that one recipe and as many ranks as now did the steps from `first`.

        Raises:
            ConfigError: they did not; the digits could not be the same.
        """
        place = f"{self.record.folder}: steps {first} to {self.step}"
        changes = [
            until for until in earlier_ends(self.record.folder) if first <= until < self.step
        ]
        if changes:
            raise ConfigError(
                f"{place}, from the checkpoint before, were done with recipes that changed after step {changes[0]}: "
                f"replay a step up to {changes[0]}, or one after a later checkpoint"
            )
        for i, segment in enumerate(self.record.segments):
            # Later starts have taken back what comes after their beginnings, or rollbacks.
            end = min([self.step, *(later.lowest for later in self.record.segments[i + 1 :])])
            had = segment.about.get("ranks", ranks)
            if end >= first and end > segment.lowest and had != ranks:
                raise ConfigError(
                    f"{place} were done by {had} ranks, and these are {ranks}: start the replay with --nproc_per_node "
                    f"{had} (on as many machines as the run)"
                )


def read_replayed(folder: Path, step: int) -> ReplayedRun:
    """Read the records of the run in `folder`.

    Raises:
        DataError: there are none.
        ConfigError: the run has not logged the step.
    """
    record = read_run(folder)
    logged = _rows(record)
    if step not in logged:
        known = f"steps {min(logged)} to {max(logged)}" if logged else "no step"
        raise ConfigError(f"--step is {step}: {folder} has logged {known}")
    until = min((end for end in earlier_ends(folder) if end >= step), default=None)
    path = folder / RECIPE if until is None else earlier_recipe(folder, until)
    recipe = load_recipe(path)
    if not recipe.checkpoint.save:
        raise ConfigError(f"{path}: checkpoint.save is empty: the run has saved nothing")
    # The folder may have been moved since.
    checkpoints = Path(recipe.checkpoint.save) if recipe.training.run_dir else folder
    return ReplayedRun(record=record, recipe=recipe, checkpoints=checkpoints, step=step)


def replay_run(folder: Path, step: int) -> None:
    """Replay a step of the run in `folder`. Collective.

    Raises:
        ConfigError: it cannot be replayed.
        VitaError: a step is not as logged.
    """
    import torch.distributed as dist

    from megatron_vita.training.replay import open_replay, replay

    replayed = read_replayed(folder, step)
    run = open_replay(replayed.recipe, replayed.checkpoints, step=step)
    first = run.step + 1
    replayed.check(first, ranks=dist.get_world_size())
    logged = {number: _logged(row) for number, row in _rows(replayed.record).items()}
    if differing := replay(run, logged, step=step):
        listed = ", ".join(map(str, differing))
        raise VitaError(f"{folder}: steps {first} to {step} were replayed; not as logged: {listed}")


def _rows(record: RunRecord) -> dict[int, Row]:
    """Return the rows with the numbers of each step, also of one that has stopped the run."""
    stopped = {step: row for step, row in record.faults.items() if row.get("action") == "stop"}
    return stopped | record.steps


def _logged(row: Row) -> "LoggedStep":
    from megatron_vita.training.replay import LoggedStep

    return LoggedStep(
        loss=row.get("train/loss"),
        grad_norm=row.get("train/grad_norm"),
        is_skipped="train/skipped" in row,
    )


def parse_arguments(arguments: list[str], *, name: str) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog=name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", type=Path, help="folder of the run: training.run_dir, or else checkpoint.save"
    )
    parser.add_argument("--step", type=int, required=True, help="the step to end with")
    return parser.parse_args(arguments)


def main(arguments: list[str], *, name: str) -> int:
    """Replay a step, and return the exit code: 0 if all steps are as logged."""
    try:
        options = parse_arguments(arguments, name=name)
        read_replayed(options.run, options.step)  # before seconds of imports
        from megatron_vita import platform

        platform.initialize_process()
        import torch.distributed as dist

        platform.set_up_logging(dist.get_rank())
        replay_run(options.run, options.step)
        platform.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        return report_failure(error)
    return 0
