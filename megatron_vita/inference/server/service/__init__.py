"""The engine as the server sees it, and the thread that owns it."""
