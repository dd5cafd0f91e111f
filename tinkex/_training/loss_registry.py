"""LossRegistry: the custom losses of one session, traced and uploaded."""

from __future__ import annotations

import itertools
import logging
import threading
from typing import Mapping, Optional, Set

import orjson

from tinkex._api import training as api
from tinkex._sessions.runtime import Runtime
from tinkex._training.create_run import wait_for_result
from tinkex._training.custom_loss import LossHandle, PerDatumLossFn, require_torch
from tinkex._training.loss_tracing import LossGraph, trace_loss
from tinkex._transport.server_flags import flags_for
from tinkex.errors import APIError, InvalidInputError, RouteMissingError
from tinkex.futures import APIFuture
from tinkex.types import CreateCustomLossResponse

logger = logging.getLogger(__name__)

_KIND = "create_custom_loss"


class LossRegistry:
    """Makes LossHandles for one session, each loss once.  Thread-safe."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        # next() on a count is atomic; a number is used up even if its request fails.
        self._numbers = itertools.count()
        # Guards _known: the graphs of the losses that were made, or are being made.
        self._lock = threading.Lock()
        self._known: Set[bytes] = set()

    def create(self, fn: PerDatumLossFn, input_ranks: Mapping[str, int]) -> APIFuture[LossHandle]:
        """Trace *fn* at once, and upload it in the background.  See `ServiceClient`."""
        require_torch("create_custom_loss")
        graph = trace_loss(fn, input_ranks)
        self._runtime.ensure_open(_KIND)
        key = orjson.dumps([graph.inputs, graph.graph])
        with self._lock:
            known = key in self._known
            self._known.add(key)
        if known:
            raise InvalidInputError(
                f"the loss {graph.name!r} was created in this session before",
                hint="Keep the LossHandle and use it for every step.",
            )

        def upload() -> LossHandle:
            try:
                return LossHandle(fn, graph, self._runtime.session.session_id, self._upload(graph))
            except BaseException:
                with self._lock:
                    self._known.discard(key)  # it may be tried again
                raise

        return self._runtime.run(_KIND, upload)

    def _upload(self, graph: LossGraph) -> Optional[str]:
        """Return the server's id of the loss, or None if it takes none.  Blocks."""
        runtime = self._runtime
        if not self._is_wanted():
            return None
        try:
            accepted = api.create_custom_loss(
                runtime.transport,
                session_id=runtime.session.session_id,
                custom_loss_seq_id=next(self._numbers),
                name=graph.name,
                inputs=[{"name": entry.name, "rank": entry.rank} for entry in graph.inputs],
                graph=graph.graph,
            )
        except RouteMissingError as error:
            logger.info("custom losses are computed here: %s", error.message)
            return None
        created = wait_for_result(runtime, _KIND, accepted, CreateCustomLossResponse)
        return created.loss_id

    def _is_wanted(self) -> bool:
        """Whether the server computes such losses; no, if it does not tell."""
        try:
            return flags_for(self._runtime.transport, once=True).custom_loss_server_side
        except APIError as error:
            logger.info("custom losses are computed here: %s", error)
            return False
