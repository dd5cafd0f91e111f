"""The command ``tinkex``.  Nothing in the library imports it.

``main`` holds the command group and turns errors into exit codes; ``connect`` opens and closes
clients; ``output`` writes tables and JSON.  Each command has a module of its own, which is imported
when the command is run.
"""
