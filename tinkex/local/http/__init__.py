"""Connections, requests and responses: everything about HTTP but the routes."""
