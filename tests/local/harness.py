"""What the server tests share: an engine that can be held up, and a client without sockets."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import (
    Any,
    Callable,
    Container,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Union,
)

from flask.testing import FlaskClient

from tinkex.local.app import create_app
from tinkex.local.backend import Backend
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.engines.engine import Finished
from tinkex.local.settings import SamplingLimits, ServerSettings
from tinkex.local.state.futures import FutureTable
from tinkex.local.state.store import Store
from tinkex.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    ForwardBackwardRequest,
    ModelInput,
    SampleRequest,
)
from tinkex.wire.codec import Codec
from tinkex.wire.json_codec import JSON
from tinkex.wire.proto_codec import PROTOBUF

#: Batches start immediately, without gathering requests.
AT_ONCE = SamplingLimits(gather_s=0.0, gather_most_s=0.0)

WAIT_S = 60.0


class ManualClock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class HeldEngine(DeterministicEngine):
    """Logs its work.  Passes with the loss `cispo` wait until they are released."""

    def __init__(self, **facts: Any) -> None:
        super().__init__(**facts)
        self.log: List[str] = []
        self.holding = threading.Event()  # set while a pass waits
        self.let_go = threading.Event()
        self.explode = False

    def forward_backward(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, Union[float, str]],
        *,
        forward_only: bool = False,
    ) -> ForwardBackwardOutput:
        if loss_fn == "cispo":
            self.holding.set()
            assert self.let_go.wait(WAIT_S)
        if self.explode:
            raise RuntimeError("the engine tripped")
        self.log.append(f"{model_id.rpartition(':')[2]}:{data[0].model_input.to_ints()[0]}")
        return super().forward_backward(
            model_id, data, loss_fn, loss_fn_config, forward_only=forward_only
        )

    def optim_step(self, model_id: str, params: AdamParams) -> Dict[str, float]:
        self.log.append(f"{model_id.rpartition(':')[2]}:optim")
        return super().optim_step(model_id, params)

    def unload(self, model_id: str) -> None:
        self.log.append(f"unload {model_id.rpartition(':')[2]}")
        super().unload(model_id)

    def unload_sampler(self, sampler_id: str) -> None:
        self.log.append(f"unload sampler {sampler_id.rpartition(':')[2]}")
        super().unload_sampler(sampler_id)

    def sample(
        self,
        sampler_id: str,
        requests: Sequence[SampleRequest],
        dropped: Container[int] = (),
    ) -> Iterator[List[Finished]]:
        self.log.append(f"sample {len(requests)}")
        for finished in super().sample(sampler_id, requests, dropped):
            self.log.append("slice")
            yield finished


def datum(first: int = 1) -> Datum:
    return Datum(
        ModelInput.from_ints([first, 2, 3]),
        {"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0]},
    )


def held_datum() -> Datum:
    """A datum for the loss cispo, with which HeldEngine waits."""
    return Datum(
        ModelInput.from_ints([1, 2]),
        {"target_tokens": [2, 3], "logprobs": [-1.0, -1.0], "advantages": [1.0, 1.0]},
    )


class Api:
    """Sends requests to the application as a client would, through Flask's test client."""

    def __init__(self, client: FlaskClient, codec: Codec = JSON) -> None:
        self.client = client
        self.codec = codec

    def post(self, route: str, expect: int = 200, /, **body: Any) -> Any:
        answer = self.client.post(f"/api/v1/{route}", json=body)
        assert answer.status_code == expect, answer.text
        return answer.get_json()

    def get(self, path: str, expect: int = 200) -> Any:
        answer = self.client.get(f"/api/v1/{path}")
        assert answer.status_code == expect, answer.text
        return answer.get_json()

    def session(self) -> str:
        return str(self.post("create_session", tags=[], sdk_version="test")["session_id"])

    def submit_model(self, session_id: str, number: int = 0, **changes: Any) -> str:
        body = {"base_model": "deterministic", "lora_config": {"rank": 8}, **changes}
        made = self.post("create_model", session_id=session_id, model_seq_id=number, **body)
        return str(made["request_id"])

    def model(self, session_id: Optional[str] = None, number: int = 0) -> str:
        request_id = self.submit_model(session_id or self.session(), number)
        return str(self.result(request_id)["model_id"])

    def submit_pass(
        self,
        model_id: str,
        seq_id: int,
        data: Optional[Sequence[Datum]] = None,
        loss_fn: str = "cross_entropy",
        expect: int = 200,
        codec: Optional[Codec] = None,
        headers: Optional[Dict[str, str]] = None,
    ) -> Any:
        codec = codec or self.codec
        asked = ForwardBackwardRequest(
            model_id, seq_id, [datum()] if data is None else list(data), loss_fn
        )
        answer = self.client.post(
            "/api/v1/forward_backward",
            data=codec.encode_forward_backward(asked),
            content_type=codec.content_type,
            headers=headers,
        )
        assert answer.status_code == expect, answer.text
        return answer.get_json()

    def hold(self, model_id: str, seq_id: int) -> str:
        """Submit a pass that HeldEngine holds until it is released."""
        return str(self.submit_pass(model_id, seq_id, [held_datum()], "cispo")["request_id"])

    def step(self, model_id: str, seq_id: int, expect: int = 200, **params: Any) -> Any:
        return self.post("optim_step", expect, model_id=model_id, seq_id=seq_id, adam_params=params)

    def sample_body(self, sampler_id: str, seq_id: int, **changes: Any) -> Dict[str, Any]:
        return {
            "sampling_session_id": sampler_id,
            "seq_id": seq_id,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
            "sampling_params": {"max_tokens": 4, "stop": []},
            **changes,
        }

    def submit_sample(self, sampler_id: str, seq_id: int, **changes: Any) -> Any:
        return self.post("asample", **self.sample_body(sampler_id, seq_id, **changes))

    def sampler(self, session_id: str, number: int = 0, **source: Any) -> str:
        made = self.post(
            "create_sampling_session",
            session_id=session_id,
            sampling_session_seq_id=number,
            **(source or {"base_model": "deterministic"}),
        )
        return str(made["sampling_session_id"])

    def poll(self, request_id: Any, accept: str = "application/json") -> Any:
        return self.client.post(
            "/api/v1/retrieve_future",
            json={"request_id": _id(request_id)},
            headers={"Accept": accept},
        )

    def result(self, request_id: Any) -> Any:
        """Wait for a future and return its result or failure."""
        deadline = time.monotonic() + WAIT_S
        while True:
            answer = self.poll(request_id)
            assert answer.status_code == 200, answer.text
            value = answer.get_json()
            if value.get("type") != "try_again":
                return value
            assert time.monotonic() < deadline, f"no result within {WAIT_S:g} s"

    def save(self, model_id: str, seq_id: int, name: str, route: str = "save_weights") -> str:
        made = self.post(route, model_id=model_id, seq_id=seq_id, path=name)
        return str(self.result(made)["path"])


def _id(request_id: Any) -> str:
    return str(request_id["request_id"] if isinstance(request_id, dict) else request_id)


@contextlib.contextmanager
def serving(
    data_dir: Path,
    engine: Optional[DeterministicEngine] = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    futures: Optional[FutureTable] = None,
    store: Optional[Store] = None,
    **settings: Any,
) -> Iterator[Api]:
    """Run a backend, and yield a client of it; ``api.backend`` is the backend itself."""
    chosen = ServerSettings(
        **{"limits": AT_ONCE, "retrieve_hold_s": WAIT_S, "max_held_polls": 100, **settings}
    )
    backend = Backend(
        engine or HeldEngine(), store or Store(data_dir), chosen, futures=futures, clock=clock
    )
    backend.start()
    app = create_app(backend, chosen)
    api = Api(app.test_client())
    api.backend = backend  # type: ignore[attr-defined]  # a test looks behind the scenes
    try:
        yield api
    finally:
        if isinstance(backend.engine, HeldEngine):
            backend.engine.let_go.set()
        backend.close(timeout_s=WAIT_S)


CODECS = (JSON, PROTOBUF)
