"""Prompts, sampling parameters, outputs, and the scheduler's decisions."""
