"""Inference from a checkpoint: the engine with its key-value cache, sampling, the server and its
client."""

import megatron_vita.platform  # noqa: F401  adapts torch to the machine before megatron-core is imported
