"""How a base's weights are kept: one file for each way."""
