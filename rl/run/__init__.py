"""A run from start to end: folder, logs, checkpoints, failures."""
