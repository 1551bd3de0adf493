"""Vision tower, projector, language model, and VitaModel that joins them."""

import megatron_vita.platform  # noqa: F401  adapts torch to the machine before megatron-core is imported
