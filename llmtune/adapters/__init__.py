"""Adapters: what can be injected into a base model, and how it is saved and loaded."""
