"""Sessions, and the heartbeats that keep them alive."""
