"""Saving weights: checkpoints, samplers, exports (docs/protocol.md, "Saving weights")."""

from __future__ import annotations

from typing import Any, Callable, Dict

from flask import Flask, Response

from tinkex.local.backend import Backend, session_of
from tinkex.local.errors import HTTPError
from tinkex.local.fields import metadata, need, need_seq_id, optional, ttl_seconds
from tinkex.local.http.messages import digest, digest_without, json_body
from tinkex.local.routes.submission import submit
from tinkex.local.scheduling.checks import check_checkpoint_name

#: Fixed weights, or those of a target that every later save of this kind updates.
_SAMPLER_KINDS = ("snapshot", "inflight")


def register(app: Flask, backend: Backend) -> None:
    """Add the routes to *app*."""

    @app.post("/api/v1/save_weights")
    def save_weights() -> Response:
        body, raw = json_body()
        return _submit_named_save(backend, body, digest(raw), "weights", "save_weights")

    @app.post("/api/v1/save_weights_for_sampler")
    def save_weights_for_sampler() -> Response:
        body, raw = json_body()
        if body.get("path") is None:
            return _submit_ephemeral_save(backend, body)
        return _submit_named_save(
            backend, body, digest(raw), "sampler_weights", "save_weights_for_sampler"
        )

    @app.post("/api/v1/save_weights_external")
    def save_weights_external() -> Response:
        body, raw = json_body()
        return _submit_named_save(
            backend, body, digest(raw), "external_weights", "save_weights_external"
        )


def _submit_named_save(
    backend: Backend, body: Dict[str, Any], body_digest: bytes, kind: str, route: str
) -> Response:
    model_id = need(body, "model_id", str)

    def prepare() -> Callable[[], object]:
        _check_named(body)
        name = check_checkpoint_name(need(body, "path", str))
        overwrite = bool(optional(body, "overwrite", bool))
        ttl_s = ttl_seconds(body)
        user_metadata = metadata(body)
        backend.store.check_name_free(model_id, kind, name, overwrite)

        def save() -> object:
            saving = backend.store.saving(
                model_id, kind, name, overwrite=overwrite, ttl_s=ttl_s, user_metadata=user_metadata
            )
            with saving as folder:
                if kind == "external_weights":
                    backend.engine.export(model_id, folder)
                else:
                    backend.engine.save(model_id, folder, with_optimizer=kind == "weights")
            saved: Dict[str, Any] = {"path": f"tinker://{model_id}/{kind}/{name}", "type": route}
            if kind == "external_weights":
                saved["size_bytes"] = backend.checkpoint(model_id, kind, name).size_bytes
            return saved

        return save

    return submit(backend, model_id, need_seq_id(body), body_digest, prepare)


def _check_named(body: Dict[str, Any]) -> None:
    if _sampler_kind(body) == "inflight":
        raise HTTPError(400, "inflight weights have no name; leave out the path")
    if body.get("age_encryption_recipients"):
        raise HTTPError(
            400,
            "age_encryption_recipients are not offered here: the weights stay on this machine; "
            "leave them out",
        )


def _sampler_kind(body: Dict[str, Any]) -> str:
    kind = optional(body, "kind", str) or "snapshot"
    if kind not in _SAMPLER_KINDS:
        raise HTTPError(400, f"kind is {kind!r}; it must be one of {', '.join(_SAMPLER_KINDS)}")
    return kind


def _submit_ephemeral_save(backend: Backend, body: Dict[str, Any]) -> Response:
    """Make a sampler of the weights as they are, without a checkpoint.

    An inflight one follows the run: every later inflight save updates it too.
    """
    model_id = need(body, "model_id", str)
    # The official client takes a new sampler number for every retry of the same seq_id.
    body_digest = digest_without(body, "sampling_session_seq_id")

    def prepare() -> Callable[[], object]:
        follows = model_id if _sampler_kind(body) == "inflight" else None
        number = need_seq_id(body, "sampling_session_seq_id")
        sampler_id = f"{session_of(model_id)}:sample:{number}"

        def save() -> object:
            def weights() -> Any:
                folder = backend.store.new_sampler_folder()
                backend.engine.save(model_id, folder, with_optimizer=False)
                return folder

            backend.create_sampler(sampler_id, body_digest, None, weights, follows=follows)
            return {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"}

        return save

    return submit(backend, model_id, need_seq_id(body), body_digest, prepare)
