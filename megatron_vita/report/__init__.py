"""Runs as one HTML page, from what is in their folders."""
