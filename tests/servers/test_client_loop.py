"""The client's complete loop against every server profile."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Iterator, Optional, Tuple

import pytest
from servers.loop import ADAM, EVERYTHING, STEPS, Loop, Step, datum, many_datums_in_chunks
from servers.profiles import ProfiledServer
from servers.raw import KEY, Raw
from support.threads import wait_until

import tinkex
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.settings import ClientFlags, DynamicClientFlags, ServerSettings
from tinkex.types import ModelInput


@pytest.fixture
def loop(raw: Raw, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> Iterator[Loop]:
    """A Loop whose client has no setting about its server."""
    raw.engine.gate.set()
    caplog.set_level(logging.INFO, logger="tinkex")
    key = None if raw.profile.startswith("skyrl") else KEY
    with tinkex.ServiceClient(base_url=raw.server.url, api_key=key, max_outage_s=1.5) as service:
        yield Loop(service, raw.profile, tmp_path)
    loud = [r.getMessage() for r in caplog.records if r.levelno > logging.INFO]
    assert not [text for text in loud if not _expected(text)]


def _expected(text: str) -> bool:
    return "NaN" in text  # the warning about tokens beyond the vocabulary


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_step(loop: Loop, step: Step) -> None:
    step(loop)


def test_whole_loop(loop: Loop) -> None:
    """All steps in one session, and mostly on one run."""
    _run_all(loop)


def _run_all(loop: Loop) -> None:
    for step in STEPS:
        if step is not many_datums_in_chunks:  # slow, and does not depend on its place in the order
            step(loop)


#: The flags that the hosted service may switch on.
FLAGS = ServerSettings(
    retrieve_hold_s=2.0,
    flags=ClientFlags(
        sample_use_retrieve_futures=True,
        sample_join_sampling_session=True,
        custom_loss_server_side=True,
        parallel_fwdbwd_chunks=False,
        fwdbwd_max_chunk_len=100,
    ),
    dynamic_flags=DynamicClientFlags(sample_cancel_enabled=True),
    metadata_threshold_bytes=50,
)


@pytest.mark.parametrize(
    ("profile", "settings"),
    [(None, ServerSettings()), (None, FLAGS), ("hosted", FLAGS)],
    ids=["none", "none-flags", "hosted-flags"],
)
def test_whole_loop_with_flags(
    profile: Optional[str], settings: ServerSettings, tmp_path: Path
) -> None:
    """The whole loop without a profile, with every flag set that changes the requests."""
    engine = DeterministicEngine(vocab_size=1000, context_length=256)
    with ProfiledServer(engine, profile=profile, api_key=KEY, settings=settings) as server:
        with tinkex.ServiceClient(base_url=server.url, api_key=KEY) as service:
            loop = Loop(service, profile or EVERYTHING, tmp_path)
            _run_all(loop)


def test_close_leaves_nothing(raw: Raw) -> None:
    """Closing ends all threads of the client, and the session if the server has the route."""
    key = None if raw.profile.startswith("skyrl") else KEY
    with tinkex.ServiceClient(base_url=raw.server.url, api_key=key) as service:
        trainer = service.create_lora_training_client("deterministic", rank=4)
        trainer.train_step([datum()], "cross_entropy", ADAM)
        sampler = trainer.save_weights_and_get_sampling_client()
        sampler.compute_logprobs(ModelInput.from_ints([1, 2, 3])).result(20)
        session_id = service.session_id
    servers = ("tinkex-server", "tinkex-engine", "tinkex-http-")
    wait_until(
        lambda: not any(_is_clients(t.name, servers) for t in threading.enumerate()),
        "the client's threads have ended",
    )
    status = raw.post("session_heartbeat", session_id=session_id).status_code
    assert status == (410 if raw.profile == "hosted" else 200)


def _is_clients(name: str, servers: Tuple[str, ...]) -> bool:
    return name.startswith("tinkex-") and not name.startswith(servers)
