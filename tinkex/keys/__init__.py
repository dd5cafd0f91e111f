"""Below `tinkex.auth`: where credentials are from, and what they are exchanged for."""
