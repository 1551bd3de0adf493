"""Talking to an engine or to an OpenAI-compatible server."""
