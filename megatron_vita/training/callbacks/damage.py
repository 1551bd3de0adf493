"""Limit of damaged samples."""

from megatron_vita.errors import VitaError
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.callback import Callback
from megatron_vita.training.run.run import Run

# Below this number a fraction says little: one bad sample among the first ten must not stop a run.
FEW_DOCUMENTS = 1000
LISTED = 20


class DamageCallback(Callback):
    """Limit that ends a run with more damaged samples than `data.max_damaged` allows."""

    collective = True  # raises on all ranks at once

    def __init__(self, run: Run) -> None:
        self._count(run)

    def _count(self, run: Run) -> None:
        """Count the documents of the packs that are done with."""
        assert run.train_stream is not None
        self.documents = run.train_stream.plan.documents_before(run.consumed_packs)
        self.damaged = sum(damage.pack < run.consumed_packs for damage in run.read_damage())

    def on_rollback(self, run: Run, step: int) -> None:
        """Count anew."""
        self._count(run)

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Count the step's documents.

        Raises:
            VitaError: on all ranks, with a list, once too many are damaged.
        """
        self.documents += metrics.documents
        self.damaged += metrics.damaged
        allowed = run.recipe.data.max_damaged * max(self.documents, FEW_DOCUMENTS)
        if not metrics.damaged or self.damaged <= allowed:
            return
        listed = [f"{damage.shard} {damage.key} ({damage.reason})" for damage in run.read_damage()]
        message = (
            f"step {run.step}: {self.damaged} of {self.documents} samples are damaged, more than "
            f"data.max_damaged {run.recipe.data.max_damaged:g} allows: repair or remove them, or raise "
            f"it. {'; '.join(listed[:LISTED])}"
        )
        if run.ledger_folder:
            message += f"; all {len(listed)} are in {run.ledger_folder}"
        raise VitaError(message)
