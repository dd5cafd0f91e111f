"""Waiting for results: the parts of `tinkex.poller`."""
