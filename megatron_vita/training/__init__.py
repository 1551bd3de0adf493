"""Training: setup, step, schedule, validation, metrics and callbacks."""

import megatron_vita.platform  # noqa: F401  adapts torch to the machine before megatron-core is imported
