"""One module per kind of published folder: its configuration and names of tensors."""
