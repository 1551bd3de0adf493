"""Checkpoints in megatron-core's `torch_dist` format with a manifest, complete or absent."""

import megatron_vita.platform  # noqa: F401  adapts torch to the machine before megatron-core is imported
