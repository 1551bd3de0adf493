"""A bound on damaged samples."""

from megatron_vita.errors import VitaError
from megatron_vita.training.callbacks.callback import Callback
from megatron_vita.training.metrics import StepMetrics
from megatron_vita.training.run import Run

FEW_DOCUMENTS = 1000  # a share of fewer says little
LISTED = 20


class DamageCallback(Callback):
    """Stops a run that meets more damaged samples than `data.max_damaged` allows."""

    collective = True  # raises on all ranks at once

    def __init__(self, run: Run) -> None:
        assert run.train_stream is not None
        self.documents = run.train_stream.plan.documents_before(run.consumed_packs)
        self.damaged = sum(damage.pack < run.consumed_packs for damage in run.read_damage())

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
        raise VitaError(
            f"step {run.step}: {self.damaged} of {self.documents} samples are damaged, more than data.max_damaged "
            f"{run.recipe.data.max_damaged:g} allows: mend or remove them, or raise it. {'; '.join(listed[:LISTED])}"
            + (f"; all {len(listed)} are in {run.ledger_folder}" if run.ledger_folder else "")
        )
