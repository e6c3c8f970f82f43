"""What was run: the data, settings and commands of each task, and the numbers to expect."""
