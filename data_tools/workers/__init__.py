"""Pool of worker processes, and its progress."""
