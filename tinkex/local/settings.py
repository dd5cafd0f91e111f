"""ServerSettings: everything that can be configured about an embedded server.

Frozen values, which LocalServer and create_app take; change single fields with
``dataclasses.replace``.  No threads.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, Optional, Tuple


@dataclasses.dataclass(frozen=True)
class ClientFlags:
    """The flags of ``client/config`` (docs/protocol.md, "Static flags"), except for JWT.

    ``pjwt_auth_enabled`` is not here: it follows `ServerSettings.jwt`.
    """

    credential_default_source: str = "api_key"
    sample_dispatch_bytes_semaphore_size: int = 10_485_760
    inflight_response_bytes_semaphore_size: int = 52_428_800
    fwdbwd_dispatch_bytes_semaphore_size: int = 50_000_000
    parallel_fwdbwd_chunks: bool = True
    proto_compress_fwdbwd: bool = False
    fwdbwd_max_chunk_len: int = 1024
    fwdbwd_max_chunk_bytes_count: int = 5_000_000
    billing_exception_max_pause_duration_sec: int = 3600
    sample_no_retries: bool = False
    sample_enable_stuck_detection: bool = True
    #: None: the value of `ServerSettings.max_held_polls`, so that no client exceeds it on its own.
    sample_max_concurrent_requests: Optional[int] = None
    use_pyqwest_transport: bool = True
    sample_use_retrieve_futures: bool = False
    custom_loss_server_side: bool = False
    sample_join_sampling_session: bool = False


@dataclasses.dataclass(frozen=True)
class DynamicClientFlags:
    """The flags of ``client/dynamic_config`` (docs/protocol.md, "Dynamic flags")."""

    refresh_interval_sec: int = 300
    sample_cancel_enabled: bool = False
    sample_cancel_max_batch_size: int = 64


@dataclasses.dataclass(frozen=True)
class SamplingLimits:
    """How sampling shares the engine.

    Args:
        max_live_tokens: most tokens, of prompts and continuations, in the key-value caches of all
            live batches together.  A larger request runs alone.
        max_num_samples: most continuations of one request; beyond it submissions get 400.
        max_batch_sequences: most continuations in one batch.
        max_live_batches: most batches with the same weights that take turns; another batch starts
            when those that run are full.
        gather_s: a batch starts when no new request has arrived for this many seconds, or ...
        gather_most_s: ... when its first request has waited for this many seconds.
        max_loaded: most samplers' weights that the engine holds; the least recently used make room.
        max_queued: most sample requests that wait; beyond it submissions get 429.
    """

    max_live_tokens: int = 65_536
    max_num_samples: int = 1024
    max_batch_sequences: int = 64
    max_live_batches: int = 4
    gather_s: float = 0.008
    gather_most_s: float = 0.05
    max_loaded: int = 16
    max_queued: int = 10_000


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """The settings of one embedded server.

    Args:
        api_key: the ``X-API-Key`` that clients must send; None admits everyone on this machine.
        allowed_hosts: names, besides localhost and loopback addresses, by which a server without a
            key may be reached, such as the name of a reverse proxy; pages of these hosts may send
            requests.
        jwt: True makes clients exchange their key for a token at ``auth/token``.
        jwt_lifetime_s: such a token is valid for this long.
        owner_urn: the one user, who owns every session, run and checkpoint.
        org_id: the organization of that user.
        flags: the response of ``client/config``.
        dynamic_flags: the response of ``client/dynamic_config``.
        info_message, warning_message, error_message: messages of ``create_session`` that clients
            log.
        retrieve_hold_s: a poll for a pending result is held for this long at most.
        max_held_polls: most polls that are held at a time, each in a thread (about 20 KB);
            beyond it polls get 429.  Requests of the OpenAI-compatible endpoint have a bound of
            their own of the same size.
        metadata_threshold_bytes: the size of a result larger than this is announced before the
            result is sent, to clients that allow it.
        max_body_bytes: most bytes of a request body, both as sent and decompressed; beyond it
            requests get 413.
        max_waiting_per_run: most requests of one run that wait for a missing seq_id; beyond it
            submissions get 429.
        missing_seq_id_s: requests of a run wait at least this long for a missing seq_id; then they
            fail, and clients send them again from that seq_id on.
        signed_url_lifetime_s: a signed URL of a checkpoint's files is valid for this long.
        telemetry_kept: how many telemetry events are kept in memory.
        session_ttl_s: a session without a heartbeat for this long expires.
        limits: how sampling shares the engine.
    """

    # Not in repr, which logs and some tracebacks show.
    api_key: Optional[str] = dataclasses.field(default=None, repr=False)
    allowed_hosts: Tuple[str, ...] = ()
    jwt: bool = False
    jwt_lifetime_s: float = 3600.0
    owner_urn: str = "tml:user:local"
    org_id: str = "local"
    flags: ClientFlags = ClientFlags()
    dynamic_flags: DynamicClientFlags = DynamicClientFlags()
    info_message: Optional[str] = None
    warning_message: Optional[str] = None
    error_message: Optional[str] = None
    retrieve_hold_s: float = 30.0
    max_held_polls: int = 1000
    metadata_threshold_bytes: int = 1 << 20
    max_body_bytes: int = 256 << 20
    max_waiting_per_run: int = 1024
    missing_seq_id_s: float = 60.0
    signed_url_lifetime_s: float = 900.0
    telemetry_kept: int = 1000
    session_ttl_s: float = 60.0
    limits: SamplingLimits = SamplingLimits()

    def client_config(self) -> Dict[str, Any]:
        """The body of ``client/config``."""
        flags = dataclasses.asdict(self.flags)
        if self.flags.sample_max_concurrent_requests is None:
            flags["sample_max_concurrent_requests"] = self.max_held_polls
        return {"pjwt_auth_enabled": self.jwt, **flags}

    def client_dynamic_config(self) -> Dict[str, Any]:
        """The body of ``client/dynamic_config``."""
        return dataclasses.asdict(self.dynamic_flags)
