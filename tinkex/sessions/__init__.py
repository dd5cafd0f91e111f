"""Keeping sessions alive: the parts of `tinkex.session_manager`."""
