"""Custom losses that clients bring (docs/protocol.md, "Custom losses")."""

from __future__ import annotations

import threading

from flask import Flask, Response

from tinkex.local.backend import Backend
from tinkex.local.errors import HTTPError
from tinkex.local.fields import need, need_seq_id
from tinkex.local.http.messages import answer, digest, json_body
from tinkex.local.losses.evaluation import has_torch
from tinkex.local.losses.program import read_program
from tinkex.local.settings import ServerSettings
from tinkex.local.state.futures import Success


def register(app: Flask, backend: Backend, settings: ServerSettings) -> None:
    """Add the route to *app*, if the flag says that this server takes such losses."""
    if not settings.flags.custom_loss_server_side:
        return
    # So that a repetition is not answered before there is a future to poll for.
    making = threading.Lock()

    @app.post("/api/v1/create_custom_loss")
    def create_custom_loss() -> Response:
        body, raw = json_body()
        session_id = need(body, "session_id", str)
        backend.check_session(session_id)
        number = need_seq_id(body, "custom_loss_seq_id")
        if not has_torch():
            raise HTTPError(501, "custom losses need torch, which is not installed on the server")
        program = read_program(body)
        loss_id = f"{session_id}:loss:{number}"
        request_id = f"{loss_id}:create"
        with making:
            if backend.losses.add(loss_id, digest(raw), program):
                backend.futures.create(request_id, loss_id, 0)
                made = {"loss_id": loss_id, "type": "create_custom_loss"}
                backend.futures.complete(request_id, Success(made))
        return answer({"request_id": request_id})
