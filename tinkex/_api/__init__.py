"""One function per endpoint, and one for all JSON submissions: what is sent and what comes back.

Each takes the transport first, blocks until there is a response, and raises subclasses of APIError.
"""
