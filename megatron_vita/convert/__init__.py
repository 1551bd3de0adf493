"""Conversion of weights between Hugging Face folders and distributed checkpoints, one tensor at a
time."""

import megatron_vita.platform  # noqa: F401  adapts torch to the machine before megatron-core is imported
