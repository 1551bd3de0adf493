"""Pixels: tiles of images and frames of videos, as uint8 and as normalized tensors.

Everything here is a pure function of bytes and numbers: the same input gives the same tiles on
every rank and worker. Tiles are uint8 `[n, 3, S, S]` until `normalize`, which runs where the tiles
are encoded.
"""
