"""Evaluation of models: needle in a haystack, held-out questions, adapters to public harnesses."""
