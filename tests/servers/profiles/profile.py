"""Profile: how one server of the protocol differs from the others.  Data only."""

from __future__ import annotations

import dataclasses
from typing import Optional, Tuple


@dataclasses.dataclass(frozen=True)
class Profile:
    """The choices of one server; the defaults are those of most.

    Attributes:
        name: as given to `profile_named`.
        routes: ``"METHOD path"`` of every route it has, ``{id}`` standing for one segment of a path
            and ``{cp}`` for the rest of it; None means all routes.
        lacks: the missing routes, if *routes* is None.
        reads: the encodings of training batches that it can read: ``"json"``, ``"protobuf"``.
        unreadable: status for the other encoding: 415, or 500 in plain text.
        results: encoding of bulk results: ``"json"``, ``"protobuf"`` or ``"accept"``.
        compresses: results are compressed with zstd if the client accepts it.
        checks_bodies: a missing or mistyped field is answered with FastAPI's 422.
        refuses_extras: an unknown field is answered with 422, too.
        future_ids: submissions are answered with ``{future_id, status, request_id}``.
        sequence_ids: submissions of samples are answered with ``sample_sequence_ids``.
        unknown_heartbeat: status for a heartbeat of an unknown session; None is the
            application's own.
        beats_go_on: an expired session's heartbeats still succeed, and its work gets 400.
        crashes_on_unknown: an unknown session, run or sampler elsewhere gets a plain-text 500.
        unpublish_crashes: making a checkpoint private gets a plain-text 500.
        numbers: ``"wait"`` for a missing number; run in order of ``"arrival"``; or ``"strict"``: a
            number out of order fails, and a failed request does not use up its number.
        first_body_wins: a repeated number gets the first request's answer, whatever its body.
        first_logprob: what stands for the first prompt token: ``"none"``, ``"zero"``, or
            ``"absent"`` (one value fewer than tokens).
        failures: a failed request is reported as ``"200"`` with error and category, as ``"400"``
            with detail (500 if the server failed), or with a status ``"mapped"`` from the error.
        busy: a pending request is answered ``"try_again"`` or ``"408"``.
        hold_s: how long such a poll is held first.
        created, accepted: success status of immediate work, and of queued work.
        deleted: success status of deleting and publishing; 204 comes without a body.
        key: ``"none"``, ``"header"`` (X-API-Key) or ``"bearer"`` (either way).
        wrong_key: status for a key that is not the server's.
        load_into_new: None if load_weights can create a run; else the status of the refusal.
        load_first_only: load_weights must be a run's first request.
        pass_metrics: passes come with metrics; else with ``{}``.
        step_metrics: optimizer steps come with metrics; else with null.
        overwrites: a checkpoint's name can be reused; None leaves it to the request.
        sampler_paths: ``"three"`` segments, ``"two"``, or ``"checkpoints"`` for every kind.
        plain_ids: ids contain no colon.
        sampler_by_base: the answer is the ``"id"``, or a ``"future"`` to be polled for it.
        sampler_by_path: False answers 500.
        strange_tokens: a token id beyond the vocabulary is ``"refused"``, gets ``"nan"``
            logprobs, or is ``"unchecked"``.
        model_key: the field that holds a model's name in the capabilities.
    """

    name: str
    routes: Optional[Tuple[str, ...]] = None
    lacks: Tuple[str, ...] = ()
    reads: Tuple[str, ...] = ("json", "protobuf")
    unreadable: int = 415
    results: str = "accept"
    compresses: bool = False
    checks_bodies: bool = True
    refuses_extras: bool = False
    future_ids: bool = False
    sequence_ids: bool = False
    unknown_heartbeat: Optional[int] = None
    beats_go_on: bool = False
    crashes_on_unknown: bool = False
    unpublish_crashes: bool = False
    numbers: str = "wait"
    first_body_wins: bool = False
    first_logprob: str = "none"
    failures: str = "200"
    busy: str = "try_again"
    hold_s: float = 30.0
    created: int = 200
    accepted: int = 200
    deleted: int = 200
    key: str = "header"
    wrong_key: int = 401
    load_into_new: Optional[int] = None
    load_first_only: bool = False
    pass_metrics: bool = True
    step_metrics: bool = True
    overwrites: Optional[bool] = None
    sampler_paths: str = "three"
    plain_ids: bool = False
    sampler_by_base: str = "id"
    sampler_by_path: bool = True
    strange_tokens: str = "refused"
    model_key: str = "model_name"
