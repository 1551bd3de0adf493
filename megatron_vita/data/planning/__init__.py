"""The pack plan: which samples share a pack, in which order."""
