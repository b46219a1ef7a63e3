"""Jobs for clusters: the engine's own file for a run, and handing it in (light)."""
