"""Child processes and memory shared with them."""
