"""What becomes of a call on a sampling client."""
