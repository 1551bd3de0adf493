"""Readers of source files: lines, members, compressed files, frames, samples."""
