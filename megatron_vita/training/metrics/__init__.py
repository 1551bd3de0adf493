"""Metrics of a step, their rates, and descriptions for logs."""
