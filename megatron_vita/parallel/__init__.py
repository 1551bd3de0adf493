"""Process groups and the collectives that carry out the exchanges planned by `layout`."""

import megatron_vita.platform  # noqa: F401  adapts torch to the machine before megatron-core is imported
