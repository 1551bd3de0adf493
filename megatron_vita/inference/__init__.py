"""Answers from a checkpoint: prompts, sampling, the engine with its key-value cache, and the
command line."""

import megatron_vita.platform  # noqa: F401  adapts torch to the machine before megatron-core is imported
