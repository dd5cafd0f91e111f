"""Queues of work, and the thread that has the engine do it."""
