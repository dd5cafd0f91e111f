"""HTTP, below `tinkex.transport`: connections, redirects, errors, what must not be shown."""
