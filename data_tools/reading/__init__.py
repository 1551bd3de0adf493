"""Source files read: lines, members, compressed files, frames, samples."""
