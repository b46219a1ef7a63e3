"""The tasks that a suite can set: one file each, listed in `config.TASKS`."""
