"""ScriptedRequest: a pending request whose methods are a test's functions."""

from __future__ import annotations

from typing import Any, Callable, Optional

from tinkex._results.pending import PendingRequest, SamplerId
from tinkex._transport.fast_connection import AnyChannel
from tinkex._transport.request import Reply
from tinkex.futures import APIFuture
from tinkex.types import UntypedFuture


class ScriptedRequest(PendingRequest[Any]):
    """Arguments that are left out behave as in the base class."""

    def __init__(
        self,
        future: APIFuture[Any],
        decode: Callable[[Reply], Any] = lambda reply: reply,
        send: Callable[[Optional[AnyChannel]], UntypedFuture] = lambda channel: UntypedFuture("x"),
        *,
        binary: bool = True,
        retry_after_s: Callable[[int], Optional[float]] = lambda losses: None,
        sampler: Optional[SamplerId] = None,
        on_failure: Callable[[BaseException], Optional[BaseException]] = lambda error: error,
        no_progress_s: Optional[float] = None,
    ) -> None:
        super().__init__(future, no_progress_timeout_s=no_progress_s)
        self.binary = binary
        self._decode, self._send = decode, send
        self._retry_after_s, self._on_failure = retry_after_s, on_failure
        self._sampler = sampler

    def send(self, channel: Optional[AnyChannel] = None) -> UntypedFuture:
        return self._send(channel)

    def decode(self, reply: Reply) -> Any:
        return self._decode(reply)

    def on_failure(self, error: BaseException) -> Optional[BaseException]:
        return self._on_failure(error)

    def retry_after_loss(self) -> Optional[float]:
        return self._retry_after_s(self.losses)

    def sampler_id(self) -> Optional[SamplerId]:
        return self._sampler
