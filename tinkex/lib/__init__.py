"""Module paths of the official SDK that programs import from; everything lives elsewhere."""
