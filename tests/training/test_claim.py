"""One job at a time saves to a folder: a later one takes it over."""

from pathlib import Path

import pytest

from megatron_vita.checkpoint.claim import Claim
from megatron_vita.config import load_recipe
from megatron_vita.errors import ClaimedError
from megatron_vita.training.callbacks import Callback
from megatron_vita.training.loop import train
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.run import Run

QUIET = ["data.num_workers=0", "training.eval_interval=0"]


class TakeOver(Callback):
    """Another job, which begins in the same folder after the third step."""

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        if run.step == 3:
            Claim(Path(run.recipe.checkpoint.save)).take()


def test_a_job_whose_folder_a_later_one_took_over_ends_and_changes_nothing_there(
    recipe_path: Path, tmp_path: Path
) -> None:
    fields = ["training.train_iters=8", "checkpoint.save_interval=2", "checkpoint.keep=1"]
    fields += ["checkpoint.async_save=false", f"checkpoint.save={tmp_path / 'run'}"]
    with pytest.raises(ClaimedError, match=r"another job saves here since .* ends without saving"):
        train(load_recipe(recipe_path, [*QUIET, *fields]), callbacks=[TakeOver()])
    assert [path.name for path in (tmp_path / "run").glob("*step_*")] == ["step_00000002"]
    # The later one goes on from there, and saves.
    train(load_recipe(recipe_path, [*QUIET, *fields]))
    assert (tmp_path / "run" / "latest").read_text() == "step_00000008"


def test_a_claim_that_somebody_has_removed_is_made_again(tmp_path: Path) -> None:
    claim = Claim(tmp_path)
    claim.take()
    (tmp_path / "job").unlink()
    claim.check()
    claim.check()
    Claim(tmp_path).take()
    with pytest.raises(ClaimedError):
        claim.check()


@pytest.mark.parametrize("content", ["", "one line", "a\nb\nc\n"])
def test_a_claim_that_is_cut_or_foreign_counts_as_another_job_s(
    tmp_path: Path, content: str
) -> None:
    claim = Claim(tmp_path)
    claim.take()
    (tmp_path / "job").write_text(content)
    with pytest.raises(ClaimedError):
        claim.check()
