"""Packs in flight between forward and backward in megatron-core's pipeline schedules."""

from collections.abc import Sequence

from megatron_vita.config import Recipe


def most_kept(recipe: Recipe, stage: int, *, data_parallel: int, chunks: Sequence[int]) -> int:
    """Return the most bytes that a stage keeps at once.

    Follows 1F1B and its interleaved form (`get_pp_rank_microbatches` and `get_schedule_table` of
    megatron-core): a warm-up of forwards, then one forward and one backward in turns.

    Args:
        recipe: a checked recipe.
        stage: pipeline stage.
        data_parallel: number of replicas.
        chunks: bytes that a pack keeps in each of the stage's chunks of layers.
    """
    parallel = recipe.parallel
    stages = parallel.pipeline_model_parallel_size
    packs = recipe.training.global_batch_size // data_parallel
    forwards = _order(packs, chunks=len(chunks), group=stages)
    backwards = [len(chunks) - 1 - chunk for chunk in forwards]
    # Forwards before the first backward: the later the stage, the sooner its backward comes.
    warm_up = stages - stage - 1
    if len(chunks) > 1:
        warm_up = 2 * warm_up + (len(chunks) - 1) * stages
    kept = 0
    most = 0
    for i, chunk in enumerate(forwards):
        kept += chunks[chunk]
        most = max(most, kept)
        if i >= warm_up:
            kept -= chunks[backwards[i - warm_up]]
    return most


def _order(packs: int, *, chunks: int, group: int) -> list[int]:
    """Return the chunks in the order of their forwards: groups of packs pass chunk after chunk."""
    # megatron-core sends as many packs as stages through a chunk before it turns to the next one.
    order = []
    for first in range(0, packs, group):
        of_group = min(group, packs - first)
        order += [chunk for chunk in range(chunks) for _ in range(of_group)]
    return order
