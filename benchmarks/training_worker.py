"""Cases of the training benchmark in megatron_vita, one after another in the processes that torchrun
starts for them. Started by training.py; arguments: see `work_through`."""

from pathlib import Path
from typing import Any

from packs import dealt_to_this_rank, make_pack
from training_cases import Case
from training_measure import GIB, Measurement, PackContent, StepResult, work_through
from training_profile import profile_step

from megatron_vita.costs.memory.memory import PackLoad, rank_memory
from megatron_vita.data.batch import Batch
from megatron_vita.layout.slicing import IGNORED_LABEL
from megatron_vita.parallel import groups
from megatron_vita.training.run.run import assemble_run
from megatron_vita.training.step.step import train_step


def estimated_gib(case: Case, content: PackContent) -> float:
    """Peak of the fullest stage, as a dry run predicts it."""
    load = PackLoad(tiles=content.tiles, loss_tokens=content.rows, lengths=tuple(content.lengths))
    recipe = case.recipe()
    peaks = [
        rank_memory(recipe, stage, data_parallel=case.dp, load=load).peak
        for stage in range(case.pp)
    ]
    return round(max(peaks) / GIB, 2)


def measure(case: Case, out: Path) -> dict[str, Any]:
    """Run a case in the existing process group and return its result. Collective."""
    recipe = case.recipe()
    groups.initialize_groups(recipe.parallel)
    pack = make_pack(recipe, documents=case.documents, seed=1, tiles=case.tiles)
    rows = int((pack.labels != IGNORED_LABEL).sum())
    content = PackContent(pack.document_starts.diff().tolist(), len(pack.tiles), rows)
    measurement = Measurement(case, out, content, estimated_gib=estimated_gib(case, content))
    run = assemble_run(recipe)
    measurement.write(backend=run.unwrapped_models[0].language_model.backend.name)
    measurement.note_static_memory()
    batch = dealt_to_this_rank(pack)
    del pack  # gigabytes of tiles on the host, of which the batch has this rank's
    first = batch
    if case.warm_up_tokens:
        shorter = make_pack(recipe, documents=1, seed=2, length=case.warm_up_tokens)
        first = dealt_to_this_rank(shorter)

    def step(batch: Batch = batch) -> StepResult:
        metrics = train_step(run, iter([batch] * case.packs))
        return StepResult(metrics.loss, metrics.grad_norm)

    measurement.run(step, warm_up=lambda: step(first))
    if case.profile:
        measurement.write(profile=profile_step(step))
    measurement.write(status="complete")
    return measurement.result


if __name__ == "__main__":
    work_through(measure)
