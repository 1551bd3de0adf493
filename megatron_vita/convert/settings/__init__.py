"""Settings that a folder has beside its weights: prompts, modelling files, files carried along."""
