"""Costs that follow from a recipe alone: parameters, floating-point operations, memory, load of
pipeline stages."""
