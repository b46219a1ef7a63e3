"""How much memory a training step takes, planned by arithmetic and tried by a dry run."""
