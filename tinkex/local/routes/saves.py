"""Saving weights: checkpoints, samplers, exports (docs/protocol.md, "Saving weights")."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, List

from tinkex.local.backend import session_of
from tinkex.local.errors import HTTPError
from tinkex.local.fields import metadata, optional, required, required_seq_id, ttl_seconds
from tinkex.local.http.messages import JsonBody
from tinkex.local.routes.base import Result, Routes, route
from tinkex.local.scheduling.batches import WeightsSource
from tinkex.local.scheduling.checks import check_checkpoint_name
from tinkex.local.scheduling.lanes import Work
from tinkex.local.state.encryption import encrypt_files, read_recipients

#: Fixed weights, or weights that every later inflight save of the run replaces.
_SAMPLER_KINDS = ("snapshot", "inflight")

#: Route -> kind of the checkpoint that it saves.
_KINDS = {
    "save_weights": "weights",
    "save_weights_for_sampler": "sampler_weights",
    "save_weights_external": "external_weights",
}


class SaveRoutes(Routes):
    """Views that save the weights of a run."""

    @route("POST", "save_weights")
    def save(self, body: JsonBody) -> Result:
        """Queue the saving of a training checkpoint."""
        return self._submit_save("save_weights", body)

    @route("POST", "save_weights_external")
    def export(self, body: JsonBody) -> Result:
        """Queue the export of an adapter for other programs."""
        return self._submit_save("save_weights_external", body)

    @route("POST", "save_weights_for_sampler")
    def save_for_sampler(self, body: JsonBody) -> Result:
        """Queue the saving of a sampler checkpoint; without a path, the creation of a sampler."""
        if body.get("path") is not None:
            return self._submit_save("save_weights_for_sampler", body)
        # The official client takes a new sampler number for every retry of the same seq_id.
        digest = body.digest_without("sampling_session_seq_id")
        return self._submit(body, self._prepare_sampler, digest)

    def _submit_save(self, route: str, body: JsonBody) -> Result:
        return self._submit(body, functools.partial(self._prepare_save, route))

    def _prepare_save(self, route: str, model_id: str, body: JsonBody) -> Work:
        if _sampler_kind(body) == "inflight":
            raise HTTPError(400, "inflight weights have no name; leave out the path")
        store, kind = self._backend.store, _KINDS[route]
        name = check_checkpoint_name(required(body, "path", str))
        overwrite = bool(optional(body, "overwrite", bool))
        saving = functools.partial(
            store.checkpoints.saving,
            model_id,
            kind,
            name,
            overwrite=overwrite,
            ttl_s=ttl_seconds(body),
            user_metadata=metadata(body),
        )
        recipients = _recipients(route, body)
        # Checked here, so that the error is the response to the submission; `saving` checks again.
        store.checkpoints.check_name_free(model_id, kind, name, overwrite)
        return functools.partial(self._save, route, model_id, name, saving, recipients)

    def _save(
        self,
        route: str,
        model_id: str,
        name: str,
        saving: Callable[[], ContextManager[Path]],
        recipients: List[Any],
    ) -> object:
        """Save a checkpoint within *saving*; its files are encrypted for *recipients*, if any."""
        backend, engine, kind = self._backend, self._backend.engine, _KINDS[route]
        with saving() as folder:
            if kind == "external_weights":
                engine.export(model_id, folder)
                if recipients:
                    # Within `saving`, which gives the folder its name at the end, so that plain
                    # files never have it.
                    encrypt_files(folder, recipients)
            else:
                engine.save(model_id, folder, with_optimizer=kind == "weights")
        saved: Dict[str, Any] = {"path": f"tinker://{model_id}/{kind}/{name}", "type": route}
        if kind == "external_weights":
            # `saving` has measured the files, after they were encrypted.
            saved["size_bytes"] = backend.catalog.checkpoint(model_id, kind, name).size_bytes
        return saved

    def _prepare_sampler(self, model_id: str, body: JsonBody) -> Work:
        """Make a sampler of the run's current weights, without a checkpoint.

        An inflight sampler follows the run: every later inflight save updates it, too.
        """
        seq_id = required_seq_id(body, "sampling_session_seq_id")
        return functools.partial(
            self._save_sampler,
            model_id,
            f"{session_of(model_id)}:sample:{seq_id}",
            body.digest_without("sampling_session_seq_id"),
            is_inflight=_sampler_kind(body) == "inflight",
        )

    def _save_sampler(
        self, model_id: str, sampler_id: str, digest: bytes, *, is_inflight: bool
    ) -> object:
        # Called on the engine thread when it is the request's turn: the weights are exactly those
        # that the earlier requests of the run left.
        def weights() -> WeightsSource:
            with self._backend.store.new_sampler_folder() as folder:
                self._backend.engine.save(model_id, folder, with_optimizer=False)
            # The inflight samplers of a run have one key: they share their weights, and get new
            # ones together.
            key = model_id if is_inflight else sampler_id
            return WeightsSource(key, folder, model_id, newest=is_inflight)

        self._backend.create_sampler(sampler_id, digest, None, weights)
        return {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"}


def _recipients(route: str, body: Dict[str, Any]) -> List[Any]:
    """Return the recipients to encrypt the files for, by default none; HTTPError 400 if wrong."""
    keys = optional(body, "age_encryption_recipients", list)
    if keys is None:
        return []
    if route != "save_weights_external":
        raise HTTPError(
            400, f"{route} takes no age_encryption_recipients; save_weights_external does"
        )
    return read_recipients(keys)


def _sampler_kind(body: Dict[str, Any]) -> str:
    kind = optional(body, "kind", str) or "snapshot"
    if kind not in _SAMPLER_KINDS:
        raise HTTPError(400, f"kind is {kind!r}; it must be one of {', '.join(_SAMPLER_KINDS)}")
    return kind
