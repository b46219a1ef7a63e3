"""Faster forms of a model's own layers, each used only if a probe shows equal results."""
