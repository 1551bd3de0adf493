"""Reading of planned packs in worker processes, and the ledger of damaged samples."""
