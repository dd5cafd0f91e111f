"""A program sends the same requests with the official SDK and with ``import tinkex as tinker``.

The only difference: the official SDK writes some default values, which tinkex leaves out, because
    servers of older protocols refuse unknown fields.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any, Dict, List, Mapping, Tuple

import pytest
from interop.conftest import PYTHON, ROOT
from interop.recorder import Recorder

tinker = pytest.importorskip("tinker", reason="the official client is not installed")
if not hasattr(tinker, "SampledProvenanceSpan"):
    pytest.skip("this official client is older than what is compared here", allow_module_level=True)

PROGRAM = """
import importlib, sys
tinker = importlib.import_module(sys.argv[1])
with_torch = sys.argv[2] == "torch"
types, Prompt, Sampled = tinker.types, tinker.PromptProvenanceSpan, tinker.SampledProvenanceSpan

def datum(length, **inputs):
    tokens = list(range(1, length + 1))
    targets = {"target_tokens": [token + 1 for token in tokens], **inputs}
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens), loss_fn_inputs=targets)

def told(datum):
    spans = [
        Prompt(sequence_id="q", length=1),
        Sampled(sequence_id="q", offset=1, length=datum.model_input.length - 1),
    ]
    return datum.with_provenance(model_input=spans, loss_fn_inputs=spans)

service = tinker.ServiceClient(user_metadata={"k": "v"})
with service:
    trainer = service.create_lora_training_client("deterministic", rank=4, seed=7).result()
    plain, weighted = datum(3), datum(5, weights=[1.0, 0.0, 0.5, 1.0, 1.0])
    trainer.forward([plain, weighted], "cross_entropy").result()
    trainer.forward_backward([told(weighted), plain], "cross_entropy").result()
    reward = datum(2, logprobs=[-1.0, -2.0], advantages=[0.5, 0.25])
    config = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    trainer.forward_backward([reward], "ppo", config).result()
    trainer.optim_step(tinker.AdamParams(learning_rate=0.01)).result()
    trainer.optim_step(
        tinker.AdamParams(learning_rate=0.01, weight_decay=0.1, grad_clip_norm=1.0)
    ).result()
    if with_torch:
        import torch

        def squares(data, logprobs):
            return sum((row * row * torch.arange(1.0, 1 + len(row))).sum() for row in logprobs), {}

        trainer.forward_backward_custom([told(plain), weighted], squares).result()
    saved = trainer.save_state("a", ttl_seconds=7200, user_metadata={"n": "1"}).result()
    trainer.save_state("a", overwrite=True).result()
    trainer.save_weights_for_sampler("s").result()
    trainer.save_weights_external("e", ttl_seconds=7200).result()
    trainer.save_weights_and_get_sampling_client(kind="inflight").result()
    trainer.save_weights_and_get_sampling_client().result()
    service.create_training_client_from_state(saved.path).result()
    service.create_training_client_from_state_with_optimizer(saved.path).result()
"""

COMPARED = (
    "create_model",
    "load_weights",
    "forward_backward",
    "optim_step",
    "save_weights",
    "save_weights_for_sampler",
    "save_weights_external",
)

#: The default values that the official client writes, by route and field.
DEFAULTS: Mapping[Tuple[str, str], Any] = {
    ("create_model", "optimizer_config"): {"type": "adamw"},
    ("load_weights", "optimizer_config"): {"type": "adamw"},
    ("save_weights", "overwrite"): False,
    ("save_weights_for_sampler", "kind"): "snapshot",
}
ADAM_DEFAULTS = ("weight_decay", "grad_clip_norm")

_UUID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def has_torch(python: str) -> bool:
    done = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False)
    return done.returncode == 0


def requests(recorder: Recorder, python: str, name: str, torch: bool) -> List[Tuple[str, Any]]:
    """Run the program; return its requests, with ids and defaults removed."""
    recorder.clear()
    environment: Dict[str, str] = {
        **os.environ,
        "TINKER_BASE_URL": recorder.url,
        "TINKER_API_KEY": "tml-local",
        "TINKER_TELEMETRY": "0",
    }
    if name == "tinkex":
        environment["PYTHONPATH"] = str(ROOT)
    command = [python, "-c", PROGRAM, name, "torch" if torch else "no torch"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return [
        (one.route, plain(one.route, one.body))
        for one in recorder.exchanges()
        if one.route in COMPARED
    ]


def plain(route: str, body: bytes) -> Any:
    body = _UUID.sub(b"S" * 36, body)  # of the same length, because protobuf counts bytes
    if route == "forward_backward":
        return batch(body)
    fields = json.loads(body)
    for (where, name), value in DEFAULTS.items():
        if where == route and fields.get(name) == value:
            del fields[name]
    for name in ADAM_DEFAULTS:
        if fields.get("adam_params", {}).get(name) == 0.0:
            del fields["adam_params"][name]
    return fields


def batch(body: bytes) -> List[Tuple[int, Any]]:
    """Return a ForwardBackwardRequest with sorted maps: datums are field 3, maps are 5 and 7."""
    fields = [
        (number, in_order(message(value), 2) if number == 3 else value)
        for number, value in message(body)
    ]
    return in_order(fields, 5, 7)


def in_order(fields: List[Tuple[int, Any]], *maps: int) -> List[Tuple[int, Any]]:
    """Return the fields by number, and the entries of maps, which have no order, sorted."""
    return sorted(fields, key=lambda field: (field[0], field[1] if field[0] in maps else b""))


def message(body: bytes) -> List[Tuple[int, Any]]:
    """Return the fields of a protobuf message with only numbers (type 0) and lengths (type 2)."""
    fields: List[Tuple[int, Any]] = []
    at = 0
    while at < len(body):
        key, at = varint(body, at)
        assert key & 7 in (0, 2)
        value, at = varint(body, at)
        if key & 7 == 2:
            fields.append((key >> 3, body[at : at + value]))
            at += value
        else:
            fields.append((key >> 3, value))
    return fields


def varint(body: bytes, at: int) -> Tuple[int, int]:
    value = shift = 0
    while True:
        byte = body[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def test_requests_are_the_same_except_for_written_defaults(recorder: Recorder) -> None:
    torch = has_torch(PYTHON) and has_torch(sys.executable)
    theirs = requests(recorder, sys.executable, "tinker", torch)
    ours = requests(recorder, PYTHON, "tinkex", torch)
    assert [route for route, _ in ours] == [route for route, _ in theirs]
    assert len(ours) == (16 if torch else 14)
    for mine, other in zip(ours, theirs):
        assert mine == other
