"""Pack plan: assignment of samples to packs, and their order."""
