"""What a run will need, from numbers alone: memory, disk and time, before anything is loaded."""
