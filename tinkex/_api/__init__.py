"""One function per endpoint: what is sent, and what comes back.

Each takes the transport first, blocks until there is a response, and raises APIError's children.
"""
