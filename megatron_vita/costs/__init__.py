"""Costs computed from a recipe alone: parameters, FLOPs, memory, step time, balance of stages."""
