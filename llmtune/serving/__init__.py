"""Talking to what a run made: one loaded base, its adapter switched on and off."""
