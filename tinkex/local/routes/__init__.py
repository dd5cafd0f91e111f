"""The HTTP routes, one module per topic; each has ``register(app, backend)``."""
