"""What the server remembers: on disk, sessions and checkpoints; in memory, results and more."""
