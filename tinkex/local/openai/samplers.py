"""Samplers: the samplers behind model names, which need no session of a client.

Thread-safe; starts no thread.  A sampler is opened when its model is first asked for, shared by all
requests for the model, and closed when others need its place.
"""

from __future__ import annotations

import itertools
import threading
import uuid
from collections import OrderedDict
from typing import Any, Callable, List, Optional, Sequence

from tinkex.local.backend import Backend
from tinkex.local.engines.engine import StreamingRequest
from tinkex.local.errors import HTTPError
from tinkex.local.openai.errors import OpenAIError
from tinkex.local.scheduling.batches import Sampler
from tinkex.local.scheduling.checks import check_sample
from tinkex.local.state.futures import Outcome
from tinkex.local.state.rows import CheckpointRow


class Samplers:
    """Samplers by model.

    Args:
        backend: opens the samplers; the setting for loaded samplers limits these, too.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        # Guards the two below.  Held while a sampler is opened, which links a few files, and while
        # requests are queued.
        self._lock = threading.Lock()
        self._open: OrderedDict[Any, Sampler] = OrderedDict()  # least recently used first
        self._seq_ids = itertools.count()

    def checkpoint(self, model: str) -> Optional[CheckpointRow]:
        """Return the checkpoint that *model* names; None for the base model.

        *model* is a base model, a ``tinker://`` path, or both with a semicolon between them.

        Raises:
            OpenAIError: 404 if there is no such model.
        """
        base, separator, path = model.partition(";")
        if not separator and base.startswith("tinker://"):
            base, path = "", base
        try:
            if base or not path:
                self._backend.catalog.check_base_model(base)
            return self._backend.catalog.loadable_at(path) if path else None
        except HTTPError as problem:
            raise OpenAIError(
                f"there is no model {model!r:.300}: {problem.detail}",
                "model",
                status=404,
                code="model_not_found",
            ) from problem

    def submit(
        self,
        model: str,
        requests: Sequence[StreamingRequest],
        on_done: Sequence[Callable[[Outcome], None]],
    ) -> List[str]:
        """Queue *requests* and return their ids; each outcome is passed to its *on_done*.

        Raises:
            OpenAIError: 404 if there is no such model.
            HTTPError: 400 if a request is not valid; 429 if too many are queued.  In either case,
                none of *requests* is queued.
        """
        checkpoint = self.checkpoint(model)
        backend, scheduler = self._backend, self._backend.scheduler
        costs = [check_sample(backend.info, one, backend.settings.limits) for one in requests]
        ids: List[str] = []
        try:
            with self._lock:
                sampler_id = self._sampler_locked(checkpoint).sampler_id
                for request, cost, done in zip(requests, costs, on_done):
                    seq_id = next(self._seq_ids)  # never repeated, so that bodies need no digest
                    ids.append(
                        scheduler.submit_sample(
                            sampler_id, seq_id, b"", request, cost, on_done=done
                        )
                    )
        except BaseException:
            self.cancel(ids)
            raise
        return ids

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Cancel requests; nothing happens to those that are done."""
        for request_id in request_ids:
            sampler_id = request_id.rpartition(":")[0]
            self._backend.scheduler.cancel_sample(sampler_id, request_id)

    def _sampler_locked(self, checkpoint: Optional[CheckpointRow]) -> Sampler:
        """Return the sampler of *checkpoint*; if it has to be opened, idle samplers make room."""
        # With the time, since a checkpoint saved again under the same name has other weights.
        key = checkpoint and (checkpoint.folder, checkpoint.created_at)
        if key not in self._open:
            idle = [other for other, sampler in self._open.items() if not sampler.jobs]
            excess = len(self._open) + 1 - self._backend.settings.limits.max_loaded
            for other in idle[: max(0, excess)]:
                closed = self._open.pop(other).sampler_id
                self._backend.scheduler.end_session(closed, "the sampler was not used")
            # Each sampler has a session of its own, which ends with it.
            sampler_id = f"openai-{uuid.uuid4()}"
            source = self._backend.frozen(checkpoint)
            self._open[key] = self._backend.scheduler.add_sampler(sampler_id, sampler_id, source)
        self._open.move_to_end(key)
        return self._open[key]
