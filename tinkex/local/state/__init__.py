"""What the server keeps: on disk, sessions and checkpoints; in memory, results and more."""
