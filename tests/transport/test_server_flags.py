"""ServerFlags: requested once, remembered, and never a hindrance."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Iterator

import pytest
from hypothesis import given, strategies as st
from support.clocks import ManualClock
from support.scripted_server import PATIENCE_S, Answer, ScriptedServer
from support.transports import open_transport, quick_config

from tinkex._transport.server_flags import (
    DynamicFlags,
    ServerFlags,
    dynamic_flags_for,
    flags_for,
    read_flags,
)
from tinkex._transport.transport import Transport
from tinkex.errors import (
    APIConnectionError,
    AuthenticationError,
    ClientClosedError,
    InternalServerError,
    ResponseDecodeError,
)

CONFIG = "POST /api/v1/client/config"
DYNAMIC = "POST /api/v1/client/dynamic_config"


@pytest.fixture
def transport(server: ScriptedServer) -> Iterator[Transport]:
    with open_transport(server, startup_timeout_s=0.2) as opened:
        yield opened


def test_the_defaults_are_those_of_the_reference() -> None:
    flags = ServerFlags()
    assert flags.fwdbwd_max_chunk_len == 1024
    assert flags.fwdbwd_max_chunk_bytes_count == 5_000_000
    assert flags.sample_dispatch_bytes_semaphore_size == 10 * 2**20
    assert flags.inflight_response_bytes_semaphore_size == 50 * 2**20
    assert not flags.pjwt_auth_enabled
    assert not flags.proto_compress_fwdbwd
    assert DynamicFlags() == DynamicFlags(300.0, False, 64)


def test_flags_are_requested_once_with_the_version_we_speak(
    transport: Transport, server: ScriptedServer
) -> None:
    answer = {"proto_compress_fwdbwd": True, "fwdbwd_max_chunk_len": 7, "a_flag_of_tomorrow": {}}
    server.on(CONFIG, Answer(body=answer))
    flags = flags_for(transport)
    assert flags == ServerFlags(proto_compress_fwdbwd=True, fwdbwd_max_chunk_len=7)
    assert flags_for(transport) is flags
    with open_transport(server) as another:
        assert flags_for(another) is flags
    assert [r.json() for r in server.requests()] == [{"sdk_version": "0.38.0"}]


def test_flags_are_requested_separately_for_another_key(server: ScriptedServer) -> None:
    def by_key(received: Any) -> Answer:
        return Answer(body={"fwdbwd_max_chunk_len": int(received.headers["x-api-key"][-1])})

    server.on(CONFIG, by_key)
    for number in (3, 4):
        with open_transport(server, api_key=f"tml-{number}") as transport:
            assert flags_for(transport).fwdbwd_max_chunk_len == number


def test_concurrent_first_calls_send_one_request(server: ScriptedServer) -> None:
    hold = threading.Event()
    server.on(CONFIG, Answer(body={"fwdbwd_max_chunk_len": 9}, hold=hold))
    barrier = threading.Barrier(51)

    def ask() -> ServerFlags:
        with open_transport(server) as transport:
            barrier.wait(PATIENCE_S)
            return flags_for(transport)

    with ThreadPoolExecutor(50) as pool:
        asking = [pool.submit(ask) for _ in range(50)]
        barrier.wait(PATIENCE_S)
        server.wait_for(CONFIG)
        hold.set()
        found = [future.result(PATIENCE_S) for future in asking]
    assert {flags.fwdbwd_max_chunk_len for flags in found} == {9}
    assert len(server.requests(CONFIG)) == 1


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_server_without_the_routes_has_the_defaults(
    transport: Transport, server: ScriptedServer, status: int
) -> None:
    server.on(CONFIG, Answer(status))
    server.on(DYNAMIC, Answer(status))
    for _ in range(2):
        assert flags_for(transport) == ServerFlags()
        assert dynamic_flags_for(transport) == DynamicFlags()
    assert len(server.requests()) == 2


def test_an_outage_is_raised_and_not_kept(transport: Transport, server: ScriptedServer) -> None:
    server.on(CONFIG, Answer(503, {"detail": "starting"}))
    with pytest.raises(InternalServerError, match="starting"):
        flags_for(transport)
    server.on(CONFIG, Answer(reset=True))
    with pytest.raises(APIConnectionError):
        flags_for(transport, once=True)
    server.on(CONFIG, Answer(body={"fwdbwd_max_chunk_len": 5}))
    assert flags_for(transport).fwdbwd_max_chunk_len == 5


def test_flags_damaged_in_transit_are_not_used(
    transport: Transport, server: ScriptedServer
) -> None:
    server.on(CONFIG, Answer(body=b'{"fwdbwd_max_'), Answer(body={"fwdbwd_max_chunk_len": 5}))
    with pytest.raises(APIConnectionError, match="is not JSON"):
        flags_for(transport, once=True)
    assert flags_for(transport, once=True).fwdbwd_max_chunk_len == 5


def test_a_refused_key_is_reported(transport: Transport, server: ScriptedServer) -> None:
    server.on(CONFIG, Answer(401, {"detail": "who are you?"}))
    with pytest.raises(AuthenticationError, match="who are you"):
        flags_for(transport)
    assert len(server.requests()) == 1


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b"null", b'"flags"', b"", b"\xff\x00"])
def test_nonsense_is_a_typed_error(
    transport: Transport, server: ScriptedServer, body: bytes
) -> None:
    server.on(CONFIG, Answer(body=body))
    with pytest.raises(ResponseDecodeError):
        flags_for(transport)


@pytest.mark.parametrize("value", ["many", -1, 0, 2.5, True, [], {}, float("nan")])
def test_an_invalid_flag_takes_its_default(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    flags = read_flags(ServerFlags, {"fwdbwd_max_chunk_len": value, "sample_no_retries": True})
    assert flags == ServerFlags(sample_no_retries=True)
    assert "fwdbwd_max_chunk_len" in caplog.text


def test_a_null_flag_counts_as_missing_and_numbers_may_be_written_as_floats() -> None:
    given = {"proto_compress_fwdbwd": None, "fwdbwd_max_chunk_len": 12.0}
    assert read_flags(ServerFlags, given) == ServerFlags(fwdbwd_max_chunk_len=12)


def test_closing_wakes_a_client_that_waits_for_the_request_of_another(
    server: ScriptedServer,
) -> None:
    hold = threading.Event()
    server.on(CONFIG, Answer(hold=hold))
    with open_transport(server) as first, open_transport(server) as second:
        with ThreadPoolExecutor(2) as pool:
            leading = pool.submit(flags_for, first)
            server.wait_for(CONFIG)
            waiting = pool.submit(flags_for, second)
            second.closing.set()
            with pytest.raises(ClientClosedError):
                waiting.result(PATIENCE_S)
            assert not leading.done()
            hold.set()
            assert leading.result(PATIENCE_S) == ServerFlags()


def test_a_closed_leader_leaves_the_request_to_others(server: ScriptedServer) -> None:
    server.on(CONFIG, Answer(hold=threading.Event()), Answer(body={"fwdbwd_max_chunk_len": 3}))
    with open_transport(server) as first, open_transport(server) as second:
        with ThreadPoolExecutor(2) as pool:
            leading = pool.submit(flags_for, first)
            server.wait_for(CONFIG)
            waiting = pool.submit(flags_for, second)
            first.closing.set()
            first.abort()
            with pytest.raises(ClientClosedError):
                leading.result(PATIENCE_S)
            assert waiting.result(PATIENCE_S).fwdbwd_max_chunk_len == 3


@given(
    st.dictionaries(
        st.sampled_from([field.name for field in dataclasses.fields(ServerFlags)]) | st.text(),
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats()
        | st.text()
        | st.lists(st.integers()),
    )
)
def test_any_object_gives_flags_of_the_right_types(payload: Any) -> None:
    flags = read_flags(ServerFlags, payload)
    for field in dataclasses.fields(ServerFlags):
        assert type(getattr(flags, field.name)) is type(field.default)


# Flags that change


def test_changing_flags_are_requested_again_when_they_are_old(server: ScriptedServer) -> None:
    clock = ManualClock()
    server.on(
        DYNAMIC,
        Answer(body={"refresh_interval_sec": 30, "sample_cancel_enabled": False}),
        Answer(body={"refresh_interval_sec": 1, "sample_cancel_enabled": True}),
        Answer(body={"refresh_interval_sec": 1, "sample_cancel_max_batch_size": 2}),
    )
    transport = Transport(quick_config(server), clock=clock)
    try:
        assert not dynamic_flags_for(transport).sample_cancel_enabled
        clock.advance(29.0)
        assert not dynamic_flags_for(transport).sample_cancel_enabled
        clock.advance(1.0)
        assert dynamic_flags_for(transport).sample_cancel_enabled
        clock.advance(9.0)  # no more often than that, whatever the server says
        assert dynamic_flags_for(transport).sample_cancel_max_batch_size == 64
        clock.advance(1.0)
        assert dynamic_flags_for(transport).sample_cancel_max_batch_size == 2
        assert len(server.requests(DYNAMIC)) == 3
    finally:
        transport.abort()


def test_a_failed_refresh_keeps_the_old_flags_and_is_tried_once(
    server: ScriptedServer,
) -> None:
    clock = ManualClock()
    good = Answer(body={"refresh_interval_sec": 20, "sample_cancel_enabled": True})
    server.on(DYNAMIC, good, Answer(503), Answer(reset=True), Answer(body={}))
    transport = Transport(quick_config(server), clock=clock)
    try:
        for expected in (True, True, True, False):
            assert dynamic_flags_for(transport).sample_cancel_enabled is expected
            clock.advance(21.0)
        assert len(server.requests(DYNAMIC)) == 4
    finally:
        transport.abort()
