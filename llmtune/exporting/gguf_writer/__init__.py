"""GGUF files through the official `gguf` package, the only room that writes them."""
