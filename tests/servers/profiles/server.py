"""ProfiledServer: the embedded server, imitating another one."""

from __future__ import annotations

from typing import Any, Callable, Optional, Tuple

from servers.profiles.layer import admission_of, assemble
from servers.profiles.table import profile_named

from tinkex.local import LocalServer
from tinkex.local.backend import Backend
from tinkex.local.engines.engine import Engine
from tinkex.local.http.admission import Admission
from tinkex.local.state.store import Store


class ProfiledServer(LocalServer):
    """A LocalServer that imitates the server *profile*; a plain LocalServer if that is None."""

    def __init__(self, engine: Engine, *, profile: Optional[str], **options: Any) -> None:
        super().__init__(engine, **options)
        self._profile = None if profile is None else profile_named(profile)

    def _assemble(
        self, engine: Engine, store: Store
    ) -> Tuple[Backend, Callable[..., Any], Admission]:
        if self._profile is None:
            return super()._assemble(engine, store)
        admission = admission_of(self._profile, self.settings)
        backend, app = assemble(self._profile, engine, store, self.settings, admission)
        return backend, app, admission
