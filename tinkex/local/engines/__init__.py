"""What computes: the protocol of an engine, and the engines there are.  Knows nothing of HTTP."""
