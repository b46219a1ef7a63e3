"""Base models: naming, loading, quantizing, and their tokenizers."""
