"""megatron_vita: trains and serves vision-language models over contexts of up to a million
tokens."""

__version__ = "0.1.0"
