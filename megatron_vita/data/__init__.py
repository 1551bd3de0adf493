"""Data pipeline from shards to a `Batch`: shard files, index, pack plan, documents, stream.

It does not depend on models. Names are imported from their modules: commands that read no pixels
need not wait for torch, which some of these import.
"""
