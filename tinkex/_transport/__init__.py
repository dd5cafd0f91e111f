"""HTTP: one request and its response, and the limits on both."""
