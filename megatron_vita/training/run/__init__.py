"""One run: its objects, state, folder, position in the data, faults and hooks."""
