"""Waiting for results, one by one or many at a time."""
