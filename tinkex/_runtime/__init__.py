"""Foundations: threads, clocks, late imports, numbers and URLs.  No HTTP."""
