"""The values exchanged between a program, this client and a server.  No I/O, no threads.

Names are imported on first use, because most programs need only a few of them.
"""

from tinkex._runtime.late_import import names_in_stub

__all__, __getattr__, __dir__ = names_in_stub(__spec__)
