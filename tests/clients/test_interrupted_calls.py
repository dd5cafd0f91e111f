"""Ctrl-C at every point of a call where CPython checks for signals: nothing is leaked."""

from __future__ import annotations

import dis
import sys
from types import CodeType, FrameType
from typing import Any, Callable, Dict

import pytest
from support.scripted_server import PATIENCE_S, ScriptedServer
from support.threads import wait_until
from support.tinker_routes import TinkerRoutes

from tinkex import Budget, RetryConfig, ServiceClient, types

PARAMS = types.SamplingParams(max_tokens=2)
PROMPT = types.ModelInput.from_ints([1, 2])
BATCH = [types.Datum(PROMPT, {"target_tokens": [2, 3]})]
ADAM = types.AdamParams()


class Points:
    """The points in tinkex's own code where a call of a function can be interrupted.

    CPython checks for signals at the entry of a function, after a call of a C function, and at the
    end of a loop.
    """

    def __init__(self) -> None:
        self._opcodes: Dict[CodeType, Dict[int, str]] = {}
        self._left = 0
        self._calls = 0
        self.where = ""

    def interrupt(self, number: int, function: Callable[[], object]) -> bool:
        """Interrupt a call of *function* at its point *number*; return False if it has fewer."""
        self._left, before = number, sys.gettrace()
        sys.settrace(self._enter)
        try:
            function()
        except KeyboardInterrupt:
            assert self._left == 0
        finally:
            sys.settrace(before)
        return self._left == 0

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        self._calls += 1
        if not str(frame.f_globals.get("__name__")).startswith("tinkex."):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        opcodes = self._opcodes.setdefault(
            frame.f_code, {i.offset: i.opname for i in dis.get_instructions(frame.f_code)}
        )
        last, calls = "RESUME", self._calls

        def step(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal last, calls
            if event == "opcode":
                # A Python function returns to its caller without a check for signals.
                in_c = last.startswith("CALL") and calls == self._calls
                looks = in_c or last in ("RESUME", "JUMP_BACKWARD", "JUMP_ABSOLUTE")
                last, calls = opcodes.get(frame.f_lasti, ""), self._calls
                self._left -= looks
                if looks and self._left == 0:
                    self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                    raise KeyboardInterrupt
            return step

        return step


def ensure_clean(client: ServiceClient, where: str) -> None:
    wait_until(lambda: client.inflight() == [], f"nothing is in flight, interrupted at {where}")
    wait_until(lambda: sum(client.usage().reserved) == 0, f"nothing is reserved, at {where}")


@pytest.mark.skipif(sys.gettrace() is not None, reason="something else traces")
@pytest.mark.skipif(sys.version_info >= (3, 12), reason="it does not trace all opcodes")
def test_a_call_may_be_interrupted_at_any_point(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    with ServiceClient(base_url=server.url, budget=Budget(tokens=10**6)) as client:
        limits = RetryConfig(max_connections=1)
        sampler = client.create_sampling_client(base_model="base", retry_config=limits)
        run = client.create_lora_training_client("base")

        def sample() -> Any:
            return sampler.sample(PROMPT, 1, PARAMS)

        def step() -> Any:
            return run.forward_backward(BATCH, "cross_entropy")

        for call in (sample, step):
            assert call().result(PATIENCE_S)
            points, number = Points(), 1
            while points.interrupt(number, call):
                ensure_clean(client, points.where)
                assert call().result(PATIENCE_S)  # no slot, number or thread was lost
                number += 1
            assert number > 50
