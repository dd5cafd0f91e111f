"""The samplers behind model names, which need no session of a client.

Thread-safe; no thread of its own.  A sampler is opened when its model is first asked for, shared
by all requests for it, and closed when many others were asked for since.
"""

from __future__ import annotations

import itertools
import threading
import uuid
from collections import OrderedDict
from typing import Any, Callable, Optional, Tuple

from tinkex.local.backend import Backend
from tinkex.local.engines.engine import StreamingRequest
from tinkex.local.errors import HTTPError
from tinkex.local.openai.errors import OpenAIError
from tinkex.local.scheduling.checks import check_sample
from tinkex.local.state.futures import Outcome
from tinkex.local.state.rows import CheckpointRow


class Sampler:
    """An open sampler, and how many requests use it now (guarded by the lock of Samplers)."""

    def __init__(self, sampler_id: str) -> None:
        self.sampler_id = sampler_id
        self.users = 0
        self.seq_ids = itertools.count()  # next() is atomic


class Samplers:
    """Samplers by model.

    Args:
        backend: opens them; the limit of loaded samplers in its settings is the limit here.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._most = backend.settings.limits.max_loaded
        # Guards the two below; held while a sampler is opened, which links a few files.
        self._lock = threading.Lock()
        self._open: OrderedDict[Any, Sampler] = OrderedDict()  # least recently used first

    def checkpoint(self, model: str) -> Optional[CheckpointRow]:
        """Return the checkpoint that *model* names; None for the base model.

        *model* is a base model, a ``tinker://`` path, or both with a semicolon between them.

        Raises:
            OpenAIError: 404, there is no such model.
        """
        base, separator, path = model.partition(";")
        if not separator and base.startswith("tinker://"):
            base, path = "", base
        try:
            if base or not path:
                self._backend.check_base_model(base)
            return self._checkpoint_at(path) if path else None
        except HTTPError as problem:
            raise OpenAIError(
                f"there is no model {model!r:.300}: {problem.detail}",
                "model",
                status=404,
                code="model_not_found",
            ) from problem

    def _checkpoint_at(self, path: str) -> CheckpointRow:
        checkpoint = self._backend.checkpoint_at(path)
        self._backend.check_loadable(checkpoint)
        return checkpoint

    def acquire(self, model: str) -> Sampler:
        """Return the sampler of *model*; each call is followed by one of `release`.

        Raises:
            OpenAIError: 404, there is no such model.
        """
        checkpoint = self.checkpoint(model)
        # A checkpoint that is saved again under the same name is another one.
        key: Optional[Tuple[str, float]] = None
        if checkpoint is not None:
            key = (checkpoint.folder, checkpoint.created_at)
        with self._lock:
            sampler = self._open.get(key)
            if sampler is None:
                sampler = self._open[key] = self._opened(checkpoint)
            self._open.move_to_end(key)
            sampler.users += 1
        return sampler

    def _opened(self, checkpoint: Optional[CheckpointRow]) -> Sampler:
        source = self._backend.frozen(checkpoint)
        # It is the only one of a session of its own, which ends with it.
        sampler_id = f"openai-{uuid.uuid4()}"
        self._backend.scheduler.add_sampler(sampler_id, sampler_id, source)
        return Sampler(sampler_id)

    def release(self, sampler: Sampler) -> None:
        """Note that a request is done with *sampler*."""
        with self._lock:
            sampler.users -= 1
            idle = [key for key, other in self._open.items() if other.users == 0]
            excess = max(0, len(self._open) - self._most)
            closed = [self._open.pop(key) for key in idle[:excess]]
        for one in closed:
            self._backend.scheduler.end_session(one.sampler_id, "the sampler was not used")

    def submit(
        self, sampler: Sampler, request: StreamingRequest, on_done: Callable[[Outcome], None]
    ) -> str:
        """Queue *request* and return its id; its outcome is passed to *on_done*.

        Raises:
            HTTPError: 400, it is not valid; 429, too much is queued.
        """
        backend = self._backend
        cost = check_sample(backend.info, request, backend.settings.limits)
        return backend.scheduler.submit_sample(
            sampler.sampler_id, next(sampler.seq_ids), b"", request, cost, on_done=on_done
        )

    def cancel(self, sampler: Sampler, request_id: str) -> None:
        """Have the engine stop working on a request; nothing happens if it is done."""
        self._backend.scheduler.cancel_sample(sampler.sampler_id, request_id)
