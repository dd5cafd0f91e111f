"""Custom losses of clients: reading, evaluating and training on them."""
