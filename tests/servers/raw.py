"""Raw HTTP to a server with a profile: how the rows of the table are observed."""

from __future__ import annotations

import threading
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import requests
from servers.profiles import ProfiledServer

from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.settings import ServerSettings
from tinkex.types import Datum, ForwardBackwardOutput, ForwardBackwardRequest, ModelInput
from tinkex.wire.codec import codec_for
from tinkex.wire.json_codec import JSON
from tinkex.wire.proto_codec import PROTOBUF

KEY = "tml-profiles"
WAIT_S = 60.0
SESSION = {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0"}
#: Long polls are held this short, so that answers to pending polls are seen quickly.
HOLD_S = 0.05


class GatedEngine(DeterministicEngine):
    """Passes with the loss `cispo` wait until the gate is opened."""

    def __init__(self, **facts: Any) -> None:
        super().__init__(**facts)
        self.gate = threading.Event()

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
            assert self.gate.wait(WAIT_S)
        return super().forward_backward(
            model_id, data, loss_fn, loss_fn_config, forward_only=forward_only
        )


def datum(*tokens: int) -> Datum:
    ids = list(tokens or (1, 2, 3))
    return Datum(
        ModelInput.from_ints(ids),
        {"target_tokens": [*ids[1:], 4], "weights": [1.0] * len(ids)},
    )


def rl_datum() -> Datum:
    return Datum(
        ModelInput.from_ints([1, 2]),
        {"target_tokens": [2, 3], "logprobs": [-1.0, -1.0], "advantages": [1.0, 1.0]},
    )


class Raw:
    """Talks to one server; keeps no state but the connection and the sampler numbers."""

    def __init__(self, server: LocalServer, profile: str, engine: GatedEngine) -> None:
        self.server, self.profile, self.engine = server, profile, engine
        self.http = requests.Session()
        self.http.trust_env = False
        self.codec = JSON if profile in ("skyrl-0.3", "hatchery-0.3") else PROTOBUF

    def send(self, method: str, route: str, **how: Any) -> requests.Response:
        headers = {"X-API-Key": KEY, **how.pop("headers", {})}
        url = f"{self.server.url}/api/v1/{route}"
        headers = {name: value for name, value in headers.items() if value}
        answer = self.http.request(method, url, headers=headers, timeout=WAIT_S, **how)
        if answer.status_code == 500:
            self.http.close()  # the server is about to hang up, and does not say so
        return answer

    def post(self, route: str, **body: Any) -> requests.Response:
        return self.send("POST", route, json=body)

    def ok(self, route: str, **body: Any) -> Any:
        answer = self.post(route, **body)
        assert answer.ok, f"{route}: {answer.status_code} {answer.text}"
        return answer.json()

    def session(self) -> str:
        return str(self.ok("create_session", **SESSION)["session_id"])

    def model(self, session_id: Optional[str] = None, number: int = 0) -> str:
        made = self.ok(
            "create_model",
            session_id=session_id or self.session(),
            model_seq_id=number,
            base_model="deterministic",
            lora_config={"rank": 4},
        )
        return str(self.value(made)["model_id"])

    def train(
        self,
        model_id: str,
        seq_id: int,
        data: Optional[Datum] = None,
        loss: str = "cross_entropy",
        *,
        codec: Any = None,
        route: str = "forward_backward",
        forward_only: bool = False,
    ) -> requests.Response:
        codec = codec or self.codec
        asked = ForwardBackwardRequest(
            model_id, seq_id, [data or datum()], loss, forward_only=forward_only
        )
        raw = codec.encode_forward_backward(asked)
        if route == "forward" and codec is JSON:
            raw = raw.replace(b"forward_backward_input", b"forward_input")
        return self.send("POST", route, data=raw, headers={"Content-Type": codec.content_type})

    def step(self, model_id: str, seq_id: int) -> requests.Response:
        return self.post(
            "optim_step", model_id=model_id, seq_id=seq_id, adam_params={"learning_rate": 1e-3}
        )

    def save(self, model_id: str, seq_id: int, name: str, *, sampler: bool = False) -> Any:
        route = "save_weights_for_sampler" if sampler else "save_weights"
        return self.post(route, model_id=model_id, seq_id=seq_id, path=name)

    def sampler(self, session_id: str, number: int, **source: Any) -> str:
        made = self.ok(
            "create_sampling_session",
            session_id=session_id,
            sampling_session_seq_id=number,
            **(source or {"base_model": "deterministic"}),
        )
        if "sampling_session_id" not in made:
            made = self.value(made)
        return str(made["sampling_session_id"])

    def sample(self, sampler_id: str, seq_id: int, tokens: List[int], **more: Any) -> Any:
        return self.post(
            "asample",
            sampling_session_id=sampler_id,
            seq_id=seq_id,
            prompt={"chunks": [{"type": "encoded_text", "tokens": tokens}]},
            sampling_params={"max_tokens": 1},
            **more,
        )

    def poll(self, future: Any, accept: str = "application/json", **headers: str) -> Any:
        """Poll once.  *future* is a submission's answer, its JSON, or a request id."""
        if isinstance(future, requests.Response):
            assert future.ok, f"{future.status_code} {future.text}"
            future = future.json()
        request_id = future["request_id"] if isinstance(future, dict) else future
        headers = {"Accept": accept, **headers}
        return self.send(
            "POST", "retrieve_future", json={"request_id": request_id}, headers=headers
        )

    def settled(self, future: Any, accept: str = "application/json", **headers: str) -> Any:
        """Poll until the future is settled; return the last answer."""
        while True:
            answer = self.poll(future, accept, **headers)
            if answer.status_code == 408 or b'"try_again"' in answer.content:
                continue
            return answer

    def value(self, future: Any) -> Dict[str, Any]:
        answer = self.settled(future)
        assert answer.status_code == 200, answer.text
        value: Dict[str, Any] = answer.json()
        assert "error" not in value, value
        return value

    def decoded(self, future: Any, reader: str) -> Any:
        """Decode a bulk result in whichever encoding it has; *reader* is the codec's method."""
        answer = self.settled(future, "application/x-protobuf, application/json")
        assert answer.status_code == 200, answer.text
        return getattr(codec_for(answer.headers["Content-Type"]), reader)(answer.content)


def serving(profile: str, engine: GatedEngine) -> LocalServer:
    """Return a server of *profile*, not started; without a key if the real one has none."""
    return ProfiledServer(
        engine,
        profile=profile,
        api_key=None if profile.startswith("skyrl") else KEY,
        settings=ServerSettings(retrieve_hold_s=HOLD_S),
    )
