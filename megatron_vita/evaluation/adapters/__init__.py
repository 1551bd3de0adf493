"""Adapters with which public harnesses query a server.

They import neither torch nor the rest of this package, so a harness keeps its own environment: this
repository on PYTHONPATH and the `openai` package are enough.
"""
