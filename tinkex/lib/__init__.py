"""Module paths of the official SDK, for programs that import from them; the code is elsewhere."""
