"""Decoding and encoding of tiles while prompts are computed."""
