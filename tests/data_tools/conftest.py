"""Worker processes that have imported what most of them need."""

from data_tools import pool

# It imports torch, which each worker that writes a shard would do by itself.
pool.PRELOADED.append("webdataset")
