"""Custom losses that clients bring: reading, evaluating and training on them."""
