"""Memory of parameters, optimizer, activations and hosts."""
