"""Backends of attention and norms."""
