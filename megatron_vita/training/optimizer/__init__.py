"""Optimizer, its state and the schedules of its learning rate."""
