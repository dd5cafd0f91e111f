"""PageState: what the page shows, as JSON.  Rows of the store, queues, and recent activity."""

from __future__ import annotations

import hashlib
from typing import Any, Dict, List, Optional

from tinkex._version import __version__
from tinkex.local.backend import Backend
from tinkex.local.json_text import write_json
from tinkex.local.openai.text import Text, text_of, token_name
from tinkex.local.state.activity import MOST_RUNS, MOST_SAMPLES, KeptSample, RunProgress
from tinkex.local.state.rows import CheckpointRow, RunRow, SessionRow

#: Most rows of each table; live sessions are shown besides.
_MOST_ROWS = 50


class PageState:
    """Reads the state of a server.  Thread-safe."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._started_at = backend.wall()
        self._kept_text: Optional[Text] = None

    def since(self, cursor: str) -> Dict[str, Any]:
        """Return what is new since *cursor*, which comes from the previous response.

        An empty or malformed cursor, or one of an earlier server, gets everything.
        """
        activity = self._backend.activity
        epoch, _, known = cursor.partition(".")
        version, _, digest = known.partition(".") if epoch == activity.epoch else ("0", "", "")
        number = int(version) if version.isdecimal() and len(version) < 18 else 0
        recent = activity.since(number)
        ages = self._backend.heartbeat_ages()
        tables = self._tables(list(ages))
        new_digest = hashlib.blake2b(write_json(tables), digest_size=8).hexdigest()
        queues = self._backend.scheduler.queues()
        return {
            "cursor": f"{activity.epoch}.{recent.version}.{new_digest}",
            "fresh": number == 0,
            "now": self._backend.wall(),
            "server": self._server(),
            "heartbeats": {session_id: round(age, 1) for session_id, age in ages.items()},
            "queue": queues._asdict(),
            "tokens": {
                "trained": [round(count, 1) for count in recent.trained],
                "sampled": [round(count, 1) for count in recent.sampled],
                "total_trained": recent.total_trained,
                "total_sampled": recent.total_sampled,
            },
            "curves": {run_id: _curve(run) for run_id, run in recent.runs.items()},
            "samples": [self._sample(sample) for sample in recent.samples],
            "tables": None if new_digest == digest else tables,
        }

    def _server(self) -> Dict[str, Any]:
        tokenizer = self._backend.engine.tokenizer
        return {
            "version": __version__,
            "model": self._backend.info.model_name,
            # A model without a tokenizer reads a conversation as lines.
            "chat": tokenizer is None or bool(tokenizer.chat_template),
            "started_at": self._started_at,
            "session_ttl_s": self._backend.settings.session_ttl_s,
            "most_runs": MOST_RUNS,
            "most_samples": MOST_SAMPLES,
        }

    def _tables(self, live: List[str]) -> Dict[str, Any]:
        store = self._backend.store
        sessions = {row.session_id: row for row in store.sessions(_MOST_ROWS, 0)}
        for session_id in live[-_MOST_ROWS:]:
            row = None if session_id in sessions else store.session(session_id)
            if row is not None:
                sessions[session_id] = row
        runs, _ = store.runs(_MOST_ROWS, 0)
        checkpoints, checkpoints_count = store.checkpoints.page(_MOST_ROWS, 0)
        return {
            "sessions": [_session(row) for row in sessions.values()],
            # By creation: the order of last requests changes all the time.
            "runs": [_run(row) for row in sorted(runs, key=lambda row: -row.created_at)],
            "checkpoints": [_checkpoint(row) for row in checkpoints],
            "checkpoints_count": checkpoints_count,
        }

    def _sample(self, sample: KeptSample) -> Dict[str, Any]:
        text = self._text()
        return {
            "id": sample.version,
            "at": sample.at,
            "model": sample.model,
            "prompt": text.decode(sample.prompt.tolist()),
            "prompt_length": sample.prompt_length,
            "prompt_is_cut": sample.prompt_length > len(sample.prompt),
            "tokens": [token_name(text.bytes_of(token)) for token in sample.tokens.tolist()],
            "logprobs": None if sample.logprobs is None else sample.logprobs.tolist(),
            "length": sample.length,
            "sequences": sample.sequences,
        }

    def _text(self) -> Text:
        if self._kept_text is None:  # two threads may both make it, which is harmless
            self._kept_text = text_of(self._backend.engine)
        return self._kept_text


def _curve(run: RunProgress) -> Dict[str, Any]:
    return {
        **run._asdict(),
        "point_steps": run.point_steps.tolist(),
        # Six digits halve the size.
        "point_losses": [float(f"{loss:.6g}") for loss in run.point_losses],
    }


def _session(row: SessionRow) -> Dict[str, Any]:
    return {
        "id": row.session_id,
        "name": row.facts.get("display_name"),
        "client": row.facts.get("sdk_version"),
        "created_at": row.created_at,
        "state": row.state,
        "ended_at": row.ended_at,
        "reason": row.reason,
    }


def _run(row: RunRow) -> Dict[str, Any]:
    name = (row.user_metadata or {}).get("name")
    return {
        "id": row.run_id,
        "created_at": row.created_at,
        "base_model": row.base_model,
        "rank": row.lora.rank,
        "name": name if isinstance(name, str) else None,
    }


def _checkpoint(row: CheckpointRow) -> Dict[str, Any]:
    return {
        "path": row.tinker_path,
        "run_id": row.run_id,
        "kind": row.kind,
        "name": row.name,
        "created_at": row.created_at,
        "expires_at": row.expires_at,
        "size_bytes": row.size_bytes,
        "public": row.public,
    }
