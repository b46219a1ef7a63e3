"""Tensor operations in plain torch; nothing here imports the rest of the project."""
