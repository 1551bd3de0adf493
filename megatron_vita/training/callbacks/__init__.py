"""Callbacks of the loop: logging, validation, saving, and those of users."""

from megatron_vita.training.run.callback import Callback

__all__ = ["Callback"]
