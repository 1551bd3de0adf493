"""Dataclasses from YAML and overrides: field options, checks, duplicate keys."""
