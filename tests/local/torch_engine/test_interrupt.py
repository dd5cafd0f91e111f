"""A closing server interrupts the engine: nothing is computed while the process ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from typing import Any, Callable

import pytest
from local.torch_engine.reference import make_data

from tinkex.local.engines.engine import EngineError
from tinkex.types import ModelInput, SampleRequest, SamplingParams


def layers(engine: Any) -> Any:
    return engine._network.model.base_model.layers


def in_another_thread(function: Callable[[], None]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def train(engine: Any) -> None:
    engine.forward_backward("m", make_data([6, 9]), "cross_entropy", {})


def test_a_pass_is_interrupted_between_layers(run: Any) -> None:
    reached = []
    first, second = layers(run)
    first.register_forward_pre_hook(lambda *_: in_another_thread(run.interrupt))
    second.register_forward_pre_hook(lambda *_: reached.append("second layer"))
    with pytest.raises(EngineError, match="interrupted") as raised:
        train(run)
    assert raised.value.category == "server"
    assert reached == []


def test_a_pass_is_interrupted_during_the_backward_pass(run: Any) -> None:
    reached = []
    first, second = layers(run)

    def stop(*_: Any) -> None:
        in_another_thread(run.interrupt)

    def on_gradient_of(layer: Any, hook: Callable[..., Any]) -> None:
        def after(_: Any, __: Any, output: Any) -> None:
            (output[0] if isinstance(output, tuple) else output).register_hook(hook)

        layer.register_forward_hook(after)

    on_gradient_of(second, stop)
    on_gradient_of(first, lambda _: reached.append("first layer"))
    with pytest.raises(EngineError, match="interrupted"):
        train(run)
    assert reached == []


def test_sampling_is_interrupted(engine: Any) -> None:
    engine.create_sampler("s", None)
    request = SampleRequest(ModelInput.from_ints([1, 2, 3]), 1, SamplingParams(max_tokens=400))
    slices = engine.sample("s", [request])
    next(slices)
    engine.interrupt()
    with pytest.raises(EngineError, match="interrupted"):
        next(slices)


def test_nothing_is_computed_after_an_interruption(run: Any) -> None:
    run.interrupt()
    with pytest.raises(EngineError, match="interrupted"):
        train(run)


SCRIPT = """
import sys, threading, torch
import tinkex
from tinkex import types

service = tinkex.ServiceClient.local("tiny-random")
trainer = service.create_lora_training_client("tiny-random", rank=4)
engine = service._server._engine
begun = threading.Event()

def compute_for_long(*_):
    begun.set()
    while not engine._interruption.requested:
        torch.randn(600, 600) @ torch.randn(600, 600)
    for _ in range(200):  # and a while longer than close waits
        torch.randn(600, 600) @ torch.randn(600, 600)

engine._network.model.base_model.layers[0].register_forward_pre_hook(compute_for_long)
tokens = list(range(60))
datum = types.Datum(types.ModelInput.from_ints(tokens), {"target_tokens": tokens})
trainer.forward(2 * [datum], "cross_entropy")
begun.wait()
raise KeyboardInterrupt if sys.argv[1] == "interrupt" else SystemExit(3)
"""


@pytest.mark.parametrize(("how", "code"), [("interrupt", -signal.SIGINT), ("exit", 3)])
def test_a_process_ends_cleanly_while_the_engine_computes(how: str, code: int) -> None:
    # Python ends daemon threads by unwinding them, to which C++ reacts with abort().
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, timeout=120
    )
    assert "terminate" not in done.stderr
    assert done.returncode == code, done.stderr
