"""Fitting the adapter and nothing else."""
