"""The command ``tinkex``.  Nothing in the library imports it; it has no threads of its own.

``main`` holds the command group and turns errors into exit codes; ``connect`` opens and closes
clients; ``output`` writes tables and JSON; the commands themselves are one module each and are
imported when they are run.
"""
