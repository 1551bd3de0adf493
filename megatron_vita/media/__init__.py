"""Pixels: how images become tiles, videos become frames, and both become normalised tensors.

Everything here is a pure function of bytes and numbers: the same input gives the same tiles on
every rank and worker. Tiles are uint8 `[n, 3, S, S]` until `normalize`, which runs where the tiles
are encoded.
"""
