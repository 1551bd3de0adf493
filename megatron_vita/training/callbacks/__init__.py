"""Side features of the loop: logging, validation, saving, and those that users bring."""

from megatron_vita.training.callbacks.callback import Callback

__all__ = ["Callback"]
