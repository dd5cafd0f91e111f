"""The engines, which do the computing, and their protocol.  Nothing here knows of HTTP."""
