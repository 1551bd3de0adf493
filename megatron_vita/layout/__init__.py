"""Pure index arithmetic: who holds which token, tile and feature row. No torch.distributed."""
