"""One function per endpoint, and one for all submissions in JSON: what is sent, and comes back.

Each takes the transport first, blocks until there is a response, and raises APIError's children.
"""
