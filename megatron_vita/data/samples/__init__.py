"""Chat records, and their encoding as documents of a pack."""
