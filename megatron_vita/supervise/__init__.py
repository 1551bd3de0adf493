"""Supervision of child processes, and memory shared with them."""
