"""Server profiles: the embedded server made to differ as the real servers of the protocol differ.

`tinkex serve --profile tuft-0.2`, or ``LocalServer(..., profile="tuft-0.2")``.  A profile is data
(`profile.Profile`, the table of all of them in `table`) that four small parts read:

- `layer`: a WSGI layer between HTTP and the application, which refuses and rewrites;
- `routes` and `bodies`: which routes there are, and which fields a body may have;
- `numbers`: queues of training runs that treat sequence numbers as that server does;
- `vocabulary`: an engine that takes token ids which it does not know.

Without a profile none of it is imported, and the server does everything both ways.  Nothing here
has a thread of its own.
"""

from __future__ import annotations

from tinkex.local.profiles.profile import Profile
from tinkex.local.profiles.table import NAMES, profile_named

__all__ = ["NAMES", "Profile", "profile_named"]
