"""The clients that a user calls."""
