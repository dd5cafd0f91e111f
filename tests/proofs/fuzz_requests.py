"""The valid requests from which tests/proofs/fuzz.py starts, some for each route."""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, List, Optional, Tuple


@dataclasses.dataclass
class Sent:
    """A request.

    Attributes:
        path: without the host; percent-encoded.
        must_fail: serving the request would be a breach.
    """

    method: str
    path: str
    headers: Dict[str, str]
    body: bytes
    query: str = ""
    must_fail: bool = False

    def __str__(self) -> str:
        target = self.path + ("?" + self.query if self.query else "")
        return f"{self.method} {target:.300} {self.headers!r:.600} {self.body!r:.1500}"


#: Placeholders for objects on the server, replaced in paths and bodies.  ``@seq`` is the next
#: seq_id of MODEL, ``@number`` an unused number, ``@name`` the name of a new checkpoint.
NAMES = ("SESSION", "SPARE", "MODEL", "SAMPLER", "WEIGHTS", "DRAWN", "REQUEST", "LOSS")

_TENSOR = {"data": [2, 3, 4], "dtype": "int64", "shape": [3]}
_FLOATS = {"data": [1.0, 0.5, 1.0], "dtype": "float32", "shape": [3]}
_SPARSE = {
    "dtype": "float32", "shape": [3, 4], "data": [1.0, 2.0],
    "sparse_crow_indices": [0, 1, 1, 2], "sparse_col_indices": [0, 3],
}  # fmt: skip
_DATUM = {
    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
    "loss_fn_inputs": {"target_tokens": _TENSOR, "weights": _FLOATS},
}
_POLICY_DATUM = {
    "model_input": {
        "chunks": [
            {"type": "encoded_text", "tokens": [1]}, {"type": "encoded_text", "tokens": [2, 3]},
        ]
    },
    "loss_fn_inputs": {"target_tokens": _TENSOR, "logprobs": _FLOATS, "advantages": _FLOATS},
}  # fmt: skip
_CHECKPOINT = "/api/v1/training_runs/MODEL/checkpoints/weights/kept"
_OTHER_CHECKPOINT = "/api/v1/training_runs/MODEL/checkpoints/sampler_weights/drawn"
_SAMPLE = {
    "sampling_session_id": "SAMPLER", "seq_id": "@number", "num_samples": 2,
    "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
    "sampling_params": {
        "max_tokens": 4, "stop": [9], "seed": 1, "temperature": 0.7, "top_p": 0.9, "top_k": 5
    },
    "prompt_logprobs": True, "topk_prompt_logprobs": 2, "topk_sample_logprobs": 2,
}  # fmt: skip
_COMPLETION = {
    "model": "deterministic", "prompt": ["hello", "you"], "max_tokens": 4, "n": 2, "seed": 1,
    "stop": ["x", "yz"], "logprobs": 2, "echo": True, "temperature": 0.5, "top_p": 0.5,
}  # fmt: skip
_CHAT = {
    "model": "deterministic", "max_completion_tokens": 4, "logprobs": True, "top_logprobs": 2,
    "messages": [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ],
}  # fmt: skip

#: Method, path, JSON body (None for none); several entries for a route with several forms.
VALID: List[Tuple[str, str, Optional[Dict[str, Any]]]] = [
    ("GET", "/api/v1/healthz", None),
    ("GET", "/api/v1/client/config", None),
    ("POST", "/api/v1/client/config", {"sdk_version": "x", "project_id": "p"}),
    ("GET", "/api/v1/client/dynamic_config", None),
    ("POST", "/api/v1/client/dynamic_config", {"sdk_version": "x"}),
    ("GET", "/api/v1/get_server_capabilities", None),
    ("POST", "/api/v1/auth/token", {}),
    ("GET", "/api/v1/auth/apikey/me", None),
    ("DELETE", "/api/v1/auth/apikey/me", None),
    ("POST", "/api/v1/telemetry", {
        "events": [{
            "event": "GENERIC_EVENT", "event_id": "e", "event_session_index": 0, "severity": "INFO",
            "timestamp": "2026-01-01T00:00:00Z", "event_name": "n", "event_data": {"a": 1},
        }],
        "platform": "x", "sdk_version": "x", "session_id": "SESSION", "process_uuid": "p",
    }),
    ("POST", "/api/v1/create_session", {
        "tags": ["a"], "user_metadata": {"a": [1]}, "sdk_version": "x", "project_id": "p",
        "display_name": "d",
    }),
    ("POST", "/api/v1/session_heartbeat", {"session_id": "SESSION"}),
    ("POST", "/api/v1/sessions/SPARE/finish", {"reason": {"type": "success"}, "detail": "d"}),
    ("GET", "/api/v1/sessions", None),
    ("GET", "/api/v1/sessions/SESSION", None),
    ("PUT", "/api/v1/sessions/SESSION/project", {"project_id": "p"}),
    ("POST", "/api/v1/sessions/search", {
        "session_id": "s", "project_ids": ["p"], "user_metadata": {}, "display_name": "d",
        "owner": {"type": "user", "owner_urns": ["u"]}, "limit": 5,
        "statuses": [{"type": "client_finished", "reasons": ["success"]}],
        "cursor": {"last_created_at": "2026-01-01T00:00:00Z", "last_session_id": "s"},
    }),
    ("POST", "/api/v1/create_model", {
        "session_id": "SESSION", "model_seq_id": "@number", "base_model": "deterministic",
        "lora_config": {"rank": 8, "seed": 1, "train_mlp": True, "train_attn": True},
        "optimizer_config": {"type": "adamw"}, "user_metadata": {"a": 1},
    }),
    ("POST", "/api/v1/get_info", {"model_id": "MODEL"}),
    ("POST", "/api/v1/load_weights", {
        "session_id": "SESSION", "model_seq_id": "@number", "path": "WEIGHTS", "optimizer": True,
        "base_model": "deterministic",
    }),
    ("POST", "/api/v1/load_weights", {
        "model_id": "MODEL", "seq_id": "@seq", "path": "WEIGHTS", "optimizer": False,
    }),
    ("POST", "/api/v1/forward_backward", {
        "model_id": "MODEL", "seq_id": "@seq", "forward_backward_input": {
            "data": [_DATUM, _DATUM], "loss_fn": "cross_entropy", "loss_fn_config": {},
        },
    }),
    ("POST", "/api/v1/forward_backward", {
        "model_id": "MODEL", "seq_id": "@seq", "forward_backward_input": {
            "data": [_POLICY_DATUM], "loss_fn": "ppo",
            "loss_fn_config": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
        },
    }),
    ("POST", "/api/v1/forward_backward", {
        "model_id": "MODEL", "seq_id": "@seq", "forward_backward_input": {
            "data": [_DATUM], "loss_fn": "custom", "loss_fn_config": {"loss_id": "LOSS"},
        },
    }),
    ("POST", "/api/v1/forward", {
        "model_id": "MODEL", "seq_id": "@seq",
        "forward_input": {
            "data": [{**_DATUM, "loss_fn_inputs": {"target_tokens": _TENSOR, "weights": _FLOATS}}],
            "loss_fn": "cross_entropy",
        },
    }),
    ("POST", "/api/v1/forward", {
        "model_id": "MODEL", "seq_id": "@seq", "forward_input": {
            "data": [{**_DATUM, "loss_fn_inputs": {"target_tokens": _SPARSE, "weights": _SPARSE}}],
            "loss_fn": "cross_entropy",
        },
    }),
    ("POST", "/api/v1/optim_step", {
        "model_id": "MODEL", "seq_id": "@seq", "adam_params": {
            "learning_rate": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0,
        },
    }),
    ("POST", "/api/v1/create_custom_loss", {
        "session_id": "SESSION", "custom_loss_seq_id": "@number", "name": "f",
        "inputs": [{"name": "logprobs", "rank": 1}],
        "graph": {
            "format": 1,
            "nodes": [
                {"op": "placeholder", "name": "a", "target": "a", "args": [], "kwargs": {}},
                {"op": "call_function", "name": "b", "target": "torch.sum", "args": [{"ref": "a"}]},
                {"op": "output", "name": "c", "target": "c", "args": [
                    {"tuple": [{"ref": "b"}, {"dict": {"custom/x:sum": {"ref": "b"}}}]},
                ]},
            ],
        },
    }),
    ("POST", "/api/v1/save_weights", {
        "model_id": "MODEL", "seq_id": "@seq", "path": "@name", "ttl_seconds": 3600,
        "overwrite": True, "user_metadata": {"a": 1},
    }),
    ("POST", "/api/v1/save_weights_external", {
        "model_id": "MODEL", "seq_id": "@seq", "path": "@name", "overwrite": False,
    }),
    ("POST", "/api/v1/save_weights_for_sampler", {
        "model_id": "MODEL", "seq_id": "@seq", "path": "@name", "kind": "snapshot",
    }),
    ("POST", "/api/v1/save_weights_for_sampler", {
        "model_id": "MODEL", "seq_id": "@seq", "sampling_session_seq_id": "@number",
        "kind": "inflight",
    }),
    ("POST", "/api/v1/create_sampling_session", {
        "session_id": "SESSION", "sampling_session_seq_id": "@number", "model_path": "DRAWN",
        "base_model": "deterministic",
    }),
    ("POST", "/api/v1/join_sampling_session", {"sampling_session_id": "SAMPLER"}),
    ("GET", "/api/v1/samplers/SAMPLER", None),
    ("POST", "/api/v1/asample", _SAMPLE),
    ("POST", "/api/v1/asample", {
        **_SAMPLE, "prompt_logprobs_last_n": 1, "prompt_alt_tokens_k": 1,
        "target_prompt_logprobs": {"data": [1, 2, 3], "dtype": "int64", "shape": [3, 1]},
    }),
    ("POST", "/api/v1/retrieve_future", {"request_id": "REQUEST", "allow_metadata_only": True}),
    ("POST", "/api/v1/retrieve_futures", {
        "target": {
            "type": "sampling_session", "sampling_session_id": "SAMPLER", "cloned_sampler_id": 0,
        },
        "prev_cursor": 0, "timeout": 0.0, "retrieved_request_ids": [],
    }),
    ("POST", "/api/v1/cancel_future", {"request_id": "REQUEST"}),
    ("GET", "/api/v1/training_runs", None),
    ("GET", "/api/v1/training_runs/MODEL", None),
    ("GET", "/api/v1/training_runs/MODEL/checkpoints", None),
    ("GET", "/api/v1/checkpoints", None),
    ("POST", "/api/v1/weights_info", {"tinker_path": "WEIGHTS"}),
    ("POST", "/api/v1/copy_weights", {
        "source_path": "WEIGHTS", "destination_project_id": "p", "ttl_seconds": 3600,
    }),
    ("PUT", f"{_CHECKPOINT}/ttl", {"ttl_seconds": 3600}),
    ("POST", f"{_OTHER_CHECKPOINT}/publish", None),
    ("DELETE", f"{_OTHER_CHECKPOINT}/publish", None),
    ("GET", f"{_CHECKPOINT}/archive", None),
    ("GET", "/api/v1/training_runs/MODEL/checkpoints/external_weights/out/external_weights_urls",
     None),
    ("DELETE", "/api/v1/training_runs/MODEL/checkpoints/weights/spare", None),
    ("GET", "@archive", None),
    ("GET", "@file", None),
    ("GET", "/api/v1/audit", None),
    ("GET", "/", None),
    ("GET", "/page/files/page.js", None),
    ("GET", "/page/state", None),
    *(
        (method, f"{root}/{path}", body)
        for root in ("/v1", "/oai/api/v1")
        for method, path, body in (
            ("GET", "models", None),
            ("GET", "models/deterministic", None),
            ("POST", "completions", _COMPLETION),
            ("POST", "completions", {**_COMPLETION, "stream": True}),
            ("POST", "chat/completions", _CHAT),
            ("POST", "chat/completions", {**_CHAT, "stream": True,
                                          "stream_options": {"include_usage": True}}),
            ("POST", "responses", {"input": "x"}),
        )
    ),
    ("POST", "/api/v1/unload_model", {"model_id": "MODEL"}),
]  # fmt: skip
