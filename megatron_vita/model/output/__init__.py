"""Output layer: logits and losses of the selected positions."""
