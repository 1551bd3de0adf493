"""Conversion with real weights that a package index carries."""
