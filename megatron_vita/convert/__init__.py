"""Weights in and out: Hugging Face folders to distributed checkpoints and back, tensor by
tensor."""

import megatron_vita.platform  # noqa: F401  adapts torch to the machine before megatron-core is imported
