"""One training step: batches, objectives, forward and backward."""
