"""Pages that show samples as they are seen in training."""
