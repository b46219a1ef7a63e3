"""A model or an adapter written for another program: GGUF, Ollama, 4 bits, the hub."""
