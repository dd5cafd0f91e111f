"""Runs, checkpoints, sessions and the account, by public method (docs/protocol.md)."""

from __future__ import annotations

from datetime import date, datetime, timedelta, timezone

from api.endpoint import Endpoint

from tinkex import types

TIME = "2026-11-22T18:58:30.123456Z"
INSTANT = datetime(2026, 11, 22, 18, 58, 30, 123456, tzinfo=timezone.utc)
RUN = "s-1:train:0"
PATH = f"tinkex://{RUN}".replace("tinkex", "tinker")
AT = f"training_runs/{RUN}/checkpoints/weights/a"

CHECKPOINT = {"checkpoint_id": "weights/a", "checkpoint_type": "training", "time": TIME,
              "tinker_path": f"{PATH}/weights/a"}  # fmt: skip
CHECKPOINT_GIVES = types.Checkpoint("weights/a", "training", INSTANT, f"{PATH}/weights/a")
FULL_CHECKPOINT = {
    **CHECKPOINT, "size_bytes": 17, "public": True, "user_metadata": {"k": "v"},
    "expires_at": "2026-11-22T19:58:30+01:00",
}  # fmt: skip
FULL_CHECKPOINT_GIVES = types.Checkpoint(
    "weights/a", "training", INSTANT, f"{PATH}/weights/a", 17, True, {"k": "v"},
    INSTANT.replace(microsecond=0),
)  # fmt: skip

BARE_RUN = {"training_run_id": RUN, "base_model": "b", "model_owner": "o", "is_lora": True,
            "last_request_time": TIME}  # fmt: skip
BARE_RUN_GIVES = types.TrainingRun(RUN, "b", "o", True, INSTANT)
FULL_RUN = {
    **BARE_RUN, "corrupted": True, "lora_rank": 8, "last_checkpoint": FULL_CHECKPOINT,
    "last_sampler_checkpoint": CHECKPOINT, "user_metadata": {"k": "v"},
}  # fmt: skip
FULL_RUN_GIVES = types.TrainingRun(
    RUN, "b", "o", True, INSTANT, True, 8, FULL_CHECKPOINT_GIVES, CHECKPOINT_GIVES, {"k": "v"}
)
CURSOR = {"offset": 5, "limit": 2, "total_count": 9}

_FAILURES = [
    ({"type": "request", "request_id": "r", "request_type": "Sample"},
     types.RequestFailure("r", "Sample")),
    ({"type": "training_run", "training_run_id": "t"}, types.TrainingRunFailure("t")),
    ({"type": "sampling_session", "sampling_session_id": "p"}, types.SamplingSessionFailure("p")),
]  # fmt: skip
_STATUSES = [
    ({"type": "active"}, types.SessionActive()),
    ({"type": "cancelled", "detail": "d"}, types.SessionCancelled("d")),
    ({"type": "client_finished", "reason": {"type": "errored"}, "detail": "d"},
     types.SessionClientFinished(types.SessionFinishReason("errored"), "d")),
    *(({"type": "failed", "category": "user", "message": "m", "reason": reason},
       types.SessionFailed("user", "m", gives)) for reason, gives in _FAILURES),
]  # fmt: skip
_FOUND = {"session_id": "s-1", "created_at": TIME, "owner": "urn", "project_id": "p",
          "checkpoints_count": 2}  # fmt: skip

_EVENTS = [
    ({"type": "training", "token_count": 5}, types.TrainingUsage(5)),
    ({"type": "sampling_prefill", "cached": True, "token_count": 6},
     types.SamplingPrefillUsage(6, True)),
    ({"type": "sampling_sample", "token_count": 7}, types.SamplingSampleUsage(7)),
    ({"type": "checkpoint", "count": 8}, types.CheckpointUsage(8)),
    ({"type": "storage", "free": True, "gigabyte_hours": 1.5}, types.StorageUsage(1.5, True)),
]  # fmt: skip
_COSTS = {"estimated_cost_usd": 1.25, "effective_rate_usd_per_million_tokens": 0.5,
          "effective_rate_usd_per_gigabyte_month": 0.25}  # fmt: skip
_BUCKET = {"bucket_start": TIME, "bucket_end": TIME}
_LABELS = {"base_model": "b", "user_id": "u", "user_name": "n", "session_id": "s-1",
           "project_id": "p"}  # fmt: skip


def _void(name, do, method, route, **more):
    """Return an endpoint whose answer is ignored."""
    return Endpoint(name, do, method, route, **more)


RUNS = (
    Endpoint(
        "list_training_runs",
        lambda c: c.rest.list_training_runs().result(),
        "GET", "training_runs",
        query={"limit": "20", "offset": "0", "access_scope": "owned"},
        least={"training_runs": []}, least_gives=types.TrainingRunsResponse([]),
        most={"training_runs": [FULL_RUN, BARE_RUN], "cursor": CURSOR},
        most_gives=types.TrainingRunsResponse([FULL_RUN_GIVES, BARE_RUN_GIVES],
                                              types.Cursor(5, 2, 9)),
    ),
    Endpoint(
        "list_training_runs with everything",
        lambda c: c.rest.list_training_runs(3, 4, "accessible", "p&q").result(),
        "GET", "training_runs",
        query={"limit": "3", "offset": "4", "access_scope": "accessible", "project_id": "p&q"},
        least={"training_runs": [BARE_RUN]},
        least_gives=types.TrainingRunsResponse([BARE_RUN_GIVES]),
    ),
    Endpoint(
        "get_training_run",
        lambda c: c.rest.get_training_run(RUN).result(),
        "GET", f"training_runs/{RUN}", query={"access_scope": "owned"},
        least=BARE_RUN, least_gives=BARE_RUN_GIVES, most=FULL_RUN, most_gives=FULL_RUN_GIVES,
    ),
    Endpoint(
        "get_training_run_by_tinker_path",
        lambda c: c.rest.get_training_run_by_tinker_path(
            f"{PATH}/weights/a", "accessible").result(),
        "GET", f"training_runs/{RUN}", query={"access_scope": "accessible"},
        least=BARE_RUN, least_gives=BARE_RUN_GIVES,
    ),
)  # fmt: skip

CHECKPOINTS = (
    Endpoint(
        "list_checkpoints",
        lambda c: c.rest.list_checkpoints(RUN).result(),
        "GET", f"training_runs/{RUN}/checkpoints",
        least={"checkpoints": []}, least_gives=types.CheckpointsListResponse([]),
        most={"checkpoints": [CHECKPOINT, FULL_CHECKPOINT], "cursor": CURSOR},
        most_gives=types.CheckpointsListResponse([CHECKPOINT_GIVES, FULL_CHECKPOINT_GIVES],
                                                 types.Cursor(5, 2, 9)),
    ),
    Endpoint(
        "list_user_checkpoints",
        lambda c: c.rest.list_user_checkpoints().result(),
        "GET", "checkpoints", query={"limit": "100", "offset": "0"},
        least={"checkpoints": [CHECKPOINT]},
        least_gives=types.CheckpointsListResponse([CHECKPOINT_GIVES]),
    ),
    Endpoint(
        "get_weights_info_by_tinker_path",
        lambda c: c.rest.get_weights_info_by_tinker_path(f"{PATH}/weights/a").result(),
        "POST", "weights_info", {"tinker_path": f"{PATH}/weights/a"},
        least={"base_model": "b", "is_lora": False},
        least_gives=types.WeightsInfoResponse("b", False),
        most={"base_model": "b", "is_lora": True, "lora_rank": 4, "train_unembed": True,
              "train_mlp": False, "train_attn": True,
              "optimizer_config": {"type": "dimuon", "version": 1}},
        most_gives=types.WeightsInfoResponse("b", True, 4, True, False, True,
                                             {"type": "dimuon", "version": 1}),
    ),
    _void("delete_checkpoint", lambda c: c.rest.delete_checkpoint(RUN, "weights/a").result(),
          "DELETE", AT),
    _void("delete_checkpoint_from_tinker_path",
          lambda c: c.rest.delete_checkpoint_from_tinker_path(f"{PATH}/weights/a").result(),
          "DELETE", AT),
    _void("publish_checkpoint_from_tinker_path",
          lambda c: c.rest.publish_checkpoint_from_tinker_path(f"{PATH}/weights/a").result(),
          "POST", f"{AT}/publish"),
    _void("unpublish_checkpoint_from_tinker_path",
          lambda c: c.rest.unpublish_checkpoint_from_tinker_path(f"{PATH}/weights/a").result(),
          "DELETE", f"{AT}/publish"),
    _void("set_checkpoint_ttl_from_tinker_path",
          lambda c: c.rest.set_checkpoint_ttl_from_tinker_path(f"{PATH}/weights/a", 7200).result(),
          "PUT", f"{AT}/ttl", body={"ttl_seconds": 7200}),
    _void("set_checkpoint_ttl_from_tinker_path to none",
          lambda c: c.rest.set_checkpoint_ttl_from_tinker_path(f"{PATH}/weights/a", None).result(),
          "PUT", f"{AT}/ttl", body={"ttl_seconds": None}),
    Endpoint(
        "get_external_weights_urls",
        lambda c: c.rest.get_external_weights_urls(f"{PATH}/external_weights/e").result(),
        "GET", f"training_runs/{RUN}/checkpoints/external_weights/e/external_weights_urls",
        spare=("expires",),
        least={"urls": {"model.safetensors": "https://files.test/1"}, "expires": TIME},
        least_gives=types.ExternalWeightsUrlsResponse(
            {"model.safetensors": "https://files.test/1"}, INSTANT),
    ),
    Endpoint(
        "get_checkpoint_archive_url",
        lambda c: c.rest.get_checkpoint_archive_url(RUN, "weights/a").result(),
        "GET", f"{AT}/archive",
        least={"url": "https://files.test/a"},
        least_gives=types.CheckpointArchiveUrlResponse("https://files.test/a"),
        most={"url": "https://files.test/a", "expires": TIME},
        most_gives=types.CheckpointArchiveUrlResponse("https://files.test/a", INSTANT),
    ),
    Endpoint(
        "get_checkpoint_archive_url_from_tinker_path",
        lambda c: c.rest.get_checkpoint_archive_url_from_tinker_path(f"{PATH}/weights/a").result(),
        "GET", f"{AT}/archive",
        least={"url": "https://files.test/a"},
        least_gives=types.CheckpointArchiveUrlResponse("https://files.test/a"),
    ),
    Endpoint(
        "copy_weights",
        lambda c: c.rest.copy_weights(f"{PATH}/weights/a", "project").result(),
        "POST", "copy_weights",
        {"source_path": f"{PATH}/weights/a", "destination_project_id": "project"},
        least={"tinker_path": "tinker://c/weights/a"}, least_gives="tinker://c/weights/a",
    ),
    Endpoint(
        "copy_weights with everything",
        lambda c: c.rest.copy_weights(f"{PATH}/weights/a", "project", ttl_seconds=3600,
                                      weights_access_token="wat").result(),
        "POST", "copy_weights",
        {"source_path": f"{PATH}/weights/a", "destination_project_id": "project",
         "ttl_seconds": 3600},
        headers={"x-tinker-weights-access-token": "wat"},
        least={"tinker_path": "tinker://c/weights/a"}, least_gives="tinker://c/weights/a",
    ),
)  # fmt: skip

SESSIONS = (
    Endpoint(
        "list_sessions",
        lambda c: c.rest.list_sessions().result(),
        "GET", "sessions", query={"limit": "20", "offset": "0", "access_scope": "owned"},
        least={"sessions": ["s-1", "s-2"]}, least_gives=types.ListSessionsResponse(["s-1", "s-2"]),
    ),
    Endpoint(
        "get_session",
        lambda c: c.rest.get_session("s-1", access_scope="accessible").result(),
        "GET", "sessions/s-1", query={"access_scope": "accessible"},
        least={"training_run_ids": [], "sampler_ids": []},
        least_gives=types.GetSessionResponse([], []),
        most={"training_run_ids": [RUN], "sampler_ids": ["s-1:sample:0"],
              "user_metadata": {"k": "v"}, "display_name": "d"},
        most_gives=types.GetSessionResponse([RUN], ["s-1:sample:0"], {"k": "v"}, "d"),
    ),
    _void("assign_session_project",
          lambda c: c.rest.assign_session_project("s-1", "p").result(),
          "PUT", "sessions/s-1/project", body={"project_id": "p"}),
    Endpoint(
        "export_session_trace",
        lambda c: c.rest.export_session_trace("s-1").result(),
        "GET", "sessions/s-1/trace_export",
        spare=("url",),
        least={"status": "ready", "url": "https://files.test/t"},
        least_gives="https://files.test/t",
    ),
    Endpoint(
        "search_sessions",
        lambda c: c.rest.search_sessions(types.SessionSearchRequest()).result(),
        "POST", "sessions/search", {"user_metadata": {}, "owner": {"type": "own"}},
        least={"sessions": []}, least_gives=types.SessionSearchResponse([]),
        most={"sessions": [{**_FOUND, "status": status, "display_name": "d",
                            "user_metadata": {"k": "v"}, "checkpoint_storage_bytes": 5}
                           for status, _ in _STATUSES],
              "next_cursor": {"last_created_at": TIME, "last_session_id": "s-1"}},
        most_gives=types.SessionSearchResponse(
            [types.SessionSummary("s-1", INSTANT, "urn", "p", gives, 2, "d", {"k": "v"}, 5)
             for _, gives in _STATUSES],
            types.SessionSearchCursor(TIME, "s-1")),
    ),
    Endpoint(
        "search_sessions with everything",
        lambda c: c.rest.search_sessions(types.SessionSearchRequest(
            session_id="s-1", project_ids=["p"], user_metadata={"k": "v"}, display_name="d",
            owner=types.SessionsOfUsers(["urn:a"]),
            statuses=[types.SessionStatusFilter("active"),
                      types.SessionStatusFilter("client_finished", ["errored"])],
            limit=200, cursor=types.SessionSearchCursor(TIME, "s-0"))).result(),
        "POST", "sessions/search",
        {"session_id": "s-1", "project_ids": ["p"], "user_metadata": {"k": "v"},
         "display_name": "d", "owner": {"type": "user", "owner_urns": ["urn:a"]},
         "statuses": [{"type": "active"}, {"type": "client_finished", "reasons": ["errored"]}],
         "limit": 200, "cursor": {"last_created_at": TIME, "last_session_id": "s-0"}},
        least={"sessions": [_FOUND]},
        least_gives=types.SessionSearchResponse(
            [types.SessionSummary("s-1", INSTANT, "urn", "p", checkpoints_count=2)]),
    ),
    Endpoint(
        "get_sampler",
        lambda c: c.rest.get_sampler("s-1:sample:0").result(),
        "GET", "samplers/s-1:sample:0",
        least={"sampler_id": "s-1:sample:0", "base_model": "b"},
        least_gives=types.GetSamplerResponse("s-1:sample:0", "b"),
        most={"sampler_id": "s-1:sample:0", "base_model": "b", "model_path": f"{PATH}/weights/a"},
        most_gives=types.GetSamplerResponse("s-1:sample:0", "b", f"{PATH}/weights/a"),
    ),
    Endpoint(
        "get_server_capabilities",
        lambda c: c.rest.get_server_capabilities().result(),
        "GET", "get_server_capabilities",
        least={"supported_models": []}, least_gives=types.GetServerCapabilitiesResponse([]),
        most={"supported_models": [
            {"model_name": "b", "max_context_length": 32, "trainable": True, "sampleable": False},
            {}]},
        most_gives=types.GetServerCapabilitiesResponse(
            [types.SupportedModel("b", 32, True, False), types.SupportedModel()]),
    ),
)  # fmt: skip

_ENTRY = {"timestamp": TIME, "event": "created", "event_details": {"a": [1]}}

ADMIN = (
    Endpoint(
        "get_audit_log",
        lambda c: c.admin.get_audit_log().result(),
        "GET", "audit", query={"event_type": "all"},
        least={"entries": []}, least_gives=types.AuditLogResponse([]),
        most={"entries": [{**_ENTRY, "model_id": "m", "tinker_path": "t", "purpose": "p"}, _ENTRY]},
        most_gives=types.AuditLogResponse([
            types.AuditLogEntry(INSTANT, "created", {"a": [1]}, "m", "t", "p"),
            types.AuditLogEntry(INSTANT, "created", {"a": [1]})]),
    ),
    Endpoint(
        "get_audit_log of a day",
        lambda c: c.admin.get_audit_log("teams", date(2026, 11, 5)).result(),
        "GET", "audit", query={"event_type": "teams", "day": "2026-11-05"},
        least={"entries": []}, least_gives=types.AuditLogResponse([]),
    ),
    Endpoint(
        "get_billing_usage",
        lambda c: c.admin.get_billing_usage(
            datetime(2026, 11, 1, 2, tzinfo=timezone(timedelta(hours=2))),
            "2026-11-02T00:00:00Z").result(),
        "GET", "billing/usage/events",
        query={"starting_on": "2026-11-01T00:00:00Z", "ending_before": "2026-11-02T00:00:00Z"},
        maps=("user_metadata", "sessions"),
        spare=("sessions",),
        least={"data": [], "sessions": {}}, least_gives=types.BillingUsageResponse([], {}),
        most={"data": [{**_BUCKET, **_LABELS, **_COSTS, "event_info": info} for info, _ in _EVENTS],
              "sessions": {"s-1": {"user_metadata": {"k": "v"}}, "s-2": {}},
              "cost_data_through": TIME},
        most_gives=types.BillingUsageResponse(
            [types.BillingUsageEvent(INSTANT, INSTANT, gives, **_LABELS, **_COSTS)
             for _, gives in _EVENTS],
            {"s-1": types.BillingSession({"k": "v"}), "s-2": types.BillingSession()}, INSTANT),
    ),
    Endpoint(
        "get_current_checkpoint_storage_usage",
        lambda c: c.admin.get_current_checkpoint_storage_usage().result(),
        "GET", "billing/usage/checkpoints/current",
        least={"data": []}, least_gives=types.CurrentCheckpointStorageUsageResponse([]),
        most={"effective_rate_usd_per_gigabyte_month": 0.5, "data": [
            {"project_id": "p", "org_user_urn": "u", "user_email": "e", "user_name": "n",
             "checkpoint_count": 2, "size_bytes": 3, "size_gigabytes": 0.5,
             "estimated_monthly_cost_usd": 0.25}]},
        most_gives=types.CurrentCheckpointStorageUsageResponse(
            [types.CheckpointStorageUsage(2, 3, 0.5, "p", "u", "e", "n", 0.25)], 0.5),
    ),
    Endpoint(
        "get_current_checkpoint_storage_usage of a project",
        lambda c: c.admin.get_current_checkpoint_storage_usage("p 1").result(),
        "GET", "billing/usage/checkpoints/current", query={"project_id": "p 1"},
        least={"data": []}, least_gives=types.CurrentCheckpointStorageUsageResponse([]),
    ),
)  # fmt: skip

REST = RUNS + CHECKPOINTS + SESSIONS + ADMIN
