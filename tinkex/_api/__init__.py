"""One function per endpoint: what is sent, and what comes back.

Each takes the transport first, blocks until there is an answer, and raises APIError's children.
"""
