"""How other people's checkpoints are quantized: one file for each format."""
