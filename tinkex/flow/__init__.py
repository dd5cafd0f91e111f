"""How much may be under way at once, on which threads, and who waits for whom."""
