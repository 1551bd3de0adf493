"""Index arithmetic without communication: ranks of a pack's tokens, tiles and feature rows."""
