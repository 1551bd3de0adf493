"""Vision tower, projector and language model, and VitaModel, which combines them."""

import megatron_vita.platform  # noqa: F401  adapts torch to the machine before megatron-core is imported
