"""Tar shards: index, random access, cache, object stores, quarantine lists."""
