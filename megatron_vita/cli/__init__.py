"""The command `vita`, and its commands that are no room of their own."""
