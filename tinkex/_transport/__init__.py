"""HTTP: one request and its response, and what bounds them."""
