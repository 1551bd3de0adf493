"""Inference from a checkpoint: the engine with its key-value cache, sampling, the server and its
client."""
