"""What the rest stands on: threads, clocks, late imports, numbers and URLs.  No HTTP."""
