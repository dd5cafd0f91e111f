"""The types of which the tables of endpoints consist."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Dict, Mapping, Tuple

from support.scripted_server import ScriptedServer

import tinkex

KEY = "tml-conformance-key"


class AnyNumber:
    """Stands for a counter's value in an expected body; other tests check the counting."""

    def __eq__(self, other: object) -> bool:
        return type(other) is int and other >= 0

    def __repr__(self) -> str:
        return "<a number>"


N = AnyNumber()


class Clients:
    """The public clients of one session on a scripted server, each created on first use."""

    def __init__(self, server: ScriptedServer, **settings: Any) -> None:
        self.server = server
        self._settings = {"base_url": server.url, "api_key": KEY, **settings}
        self.service = tinkex.ServiceClient(wire="protobuf", **self._settings)
        self._made: Dict[str, Any] = {}

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @property
    def trainer(self) -> Any:
        return self._once("trainer", lambda: self.service.create_lora_training_client("b", rank=8))

    @property
    def sampler(self) -> Any:
        return self._once("sampler", lambda: self.service.create_sampling_client(base_model="b"))

    @property
    def rest(self) -> Any:
        return self._once("rest", lambda: tinkex.RestClient(**self._settings))

    @property
    def admin(self) -> Any:
        return self._once("admin", lambda: tinkex.AdminClient(**self._settings))

    def close(self) -> None:
        for client in self._made.values():
            client.close()
        self.service.close()


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """One call of the public interface: the request it sends, and what it makes of the answers.

    Attributes:
        name: of the case.
        do: makes the call, and returns what the user gets.
        method, route, query: of the request; the route without ``/api/v1/``.
        body: the exact JSON of the request; None if there is no body.
        least: an answer with the required fields only; None if the answer is ignored.
        least_gives: what the user gets for it.
        most: an answer with every field of docs/protocol.md.
        most_gives: what the user gets for that.
        spare: fields of *least* that an answer may lack after all.
        maps: fields of the answers that are maps, in which no key is unknown.
        polled: the answers are results, which are polled for after the submission.
        headers: that the request must carry, besides those of all requests.
    """

    name: str
    do: Callable[[Clients], Any]
    method: str
    route: str
    body: Any = None
    query: Mapping[str, str] = dataclasses.field(default_factory=dict)
    least: Any = None
    least_gives: Any = None
    most: Any = None
    most_gives: Any = None
    spare: Tuple[str, ...] = ()
    maps: Tuple[str, ...] = (
        "user_metadata",
        "metrics",
        "urls",
        "event_details",
        "optimizer_config",
    )
    polled: bool = False
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def path(self) -> str:
        return f"/api/v1/{self.route}"


def with_strangers(value: Any, maps: Tuple[str, ...]) -> Any:
    """Return *value* with unknown fields in every object, except in the maps and inside them."""
    if isinstance(value, list):
        return [with_strangers(item, maps) for item in value]
    if not isinstance(value, dict):
        return value
    inner = {
        key: item if key in maps else with_strangers(item, maps) for key, item in value.items()
    }
    return {**inner, "x_unknown": {"a": [1, None]}, "x_null": None}
