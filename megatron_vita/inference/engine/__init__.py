"""Scheduling of requests over ranks: blocks of cache, steps, worker ranks, lost ranks."""
