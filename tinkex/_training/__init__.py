"""What becomes of a call on a training client."""
