"""Suites, metrics and the statistics of a paired comparison."""
