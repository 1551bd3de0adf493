"""Images for training and serving."""
