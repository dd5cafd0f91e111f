"""Training: from a call on a training client to its requests and results."""
