"""RestClient end to end: runs, checkpoints and sessions of the embedded server."""

from __future__ import annotations

from datetime import timezone
from typing import Any

import pytest
from support.scripted_server import PATIENCE_S

from tinkex import RestClient, ServiceClient, TrainingClient, types
from tinkex.errors import ClientClosedError, ConflictError, InvalidInputError, NotFoundError


@pytest.fixture
def rest(service: ServiceClient) -> RestClient:
    return service.create_rest_client()


@pytest.fixture
def saved(trainer: TrainingClient) -> str:
    """Path of a checkpoint."""
    return trainer.save_state("first", user_metadata={"step": "1"}).result(PATIENCE_S).path


def test_capabilities(service: ServiceClient, rest: RestClient) -> None:
    offered = rest.get_server_capabilities().result(PATIENCE_S)
    assert [m.model_name for m in offered.supported_models] == ["deterministic"]
    assert offered.supported_models[0].max_context_length == 64
    assert service.get_server_capabilities() == offered


def test_runs(service: ServiceClient, rest: RestClient, trainer: TrainingClient) -> None:
    second = service.create_lora_training_client("deterministic", rank=16, user_metadata={"k": "v"})
    page = rest.list_training_runs(limit=1).result(PATIENCE_S)
    assert page.cursor == types.Cursor(offset=0, limit=1, total_count=2)
    both = rest.list_training_runs().result(PATIENCE_S).training_runs
    assert {r.training_run_id for r in both} == {trainer.model_id, second.model_id}
    rest_of_them = rest.list_training_runs(limit=5, offset=1).result(PATIENCE_S).training_runs
    assert rest_of_them == both[1:]
    run = rest.get_training_run(second.model_id).result(PATIENCE_S)
    assert (run.base_model, run.is_lora, run.lora_rank) == ("deterministic", True, 16)
    assert run.user_metadata == {"k": "v"}
    assert run.last_request_time.tzinfo is not None


def test_a_checkpoint_from_its_making_to_its_end(
    rest: RestClient, trainer: TrainingClient, saved: str
) -> None:
    assert saved == f"tinker://{trainer.model_id}/weights/first"
    info = rest.get_weights_info_by_tinker_path(saved).result(PATIENCE_S)
    assert (info.base_model, info.is_lora, info.lora_rank) == ("deterministic", True, 4)
    (checkpoint,) = rest.list_checkpoints(trainer.model_id).result(PATIENCE_S).checkpoints
    assert (checkpoint.checkpoint_id, checkpoint.checkpoint_type) == ("weights/first", "training")
    assert checkpoint.tinker_path == saved
    assert checkpoint.user_metadata == {"step": "1"}
    assert checkpoint.time.astimezone(timezone.utc) == checkpoint.time
    assert not checkpoint.public
    assert checkpoint.expires_at is None
    run = rest.get_training_run_by_tinker_path(saved).result(PATIENCE_S)
    assert run.last_checkpoint == checkpoint

    rest.publish_checkpoint_from_tinker_path(saved).result(PATIENCE_S)
    with pytest.raises(ConflictError):
        rest.publish_checkpoint_from_tinker_path(saved).result(PATIENCE_S)
    assert rest.list_user_checkpoints().result(PATIENCE_S).checkpoints[0].public
    rest.unpublish_checkpoint_from_tinker_path(saved).result(PATIENCE_S)
    with pytest.raises(ConflictError):
        rest.unpublish_checkpoint_from_tinker_path(saved).result(PATIENCE_S)

    rest.set_checkpoint_ttl_from_tinker_path(saved, 3600).result(PATIENCE_S)
    assert rest.list_user_checkpoints().result(PATIENCE_S).checkpoints[0].expires_at is not None
    rest.set_checkpoint_ttl_from_tinker_path(saved, None).result(PATIENCE_S)
    assert rest.list_user_checkpoints().result(PATIENCE_S).checkpoints[0].expires_at is None

    rest.delete_checkpoint_from_tinker_path(saved).result(PATIENCE_S)
    with pytest.raises(NotFoundError, match="first"):
        rest.delete_checkpoint(trainer.model_id, "weights/first").result(PATIENCE_S)
    assert rest.list_user_checkpoints().result(PATIENCE_S).checkpoints == []


def test_pages_of_checkpoints(rest: RestClient, trainer: TrainingClient) -> None:
    for name in "abc":
        trainer.save_state(name).result(PATIENCE_S)
    page = rest.list_user_checkpoints(limit=2, offset=1).result(PATIENCE_S)
    assert [c.checkpoint_id for c in page.checkpoints] == ["weights/b", "weights/a"]


def test_sessions(service: ServiceClient, rest: RestClient, trainer: TrainingClient) -> None:
    sampler = service.create_sampling_client(base_model="deterministic")
    assert service.session_id in rest.list_sessions().result(PATIENCE_S).sessions
    session = rest.get_session(service.session_id).result(PATIENCE_S)
    assert session.training_run_ids == [trainer.model_id]
    assert session.sampler_ids == [sampler.sampling_session_id]
    info = rest.get_sampler(sampler.sampling_session_id).result(PATIENCE_S)
    assert info.base_model == "deterministic"


PATH = "tinker://nobody/weights/x"
UNKNOWN = {
    "run": lambda r: r.get_training_run("nobody"),
    "run of a path": lambda r: r.get_training_run_by_tinker_path(PATH),
    "checkpoints": lambda r: r.list_checkpoints("nobody"),
    "weights": lambda r: r.get_weights_info_by_tinker_path(PATH),
    "delete": lambda r: r.delete_checkpoint_from_tinker_path(PATH),
    "publish": lambda r: r.publish_checkpoint_from_tinker_path(PATH),
    "ttl": lambda r: r.set_checkpoint_ttl_from_tinker_path(PATH, 3600),
    "session": lambda r: r.get_session("nobody"),
    "sampler": lambda r: r.get_sampler("nobody"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_does_not_exist_is_not_found(rest: RestClient, what: str) -> None:
    with pytest.raises(NotFoundError):
        UNKNOWN[what](rest).result(PATIENCE_S)


@pytest.mark.parametrize(
    "path", ["", "/tmp/x", "tinker://", "tinker://run", "tinker://r/w/x", "tinker://r/weights/", 7]
)
def test_a_wrong_path_is_told_at_once(rest: RestClient, path: Any) -> None:
    for call in (
        rest.delete_checkpoint_from_tinker_path,
        rest.publish_checkpoint_from_tinker_path,
        rest.unpublish_checkpoint_from_tinker_path,
        rest.get_training_run_by_tinker_path,
        lambda p: rest.set_checkpoint_ttl_from_tinker_path(p, 5),
    ):
        with pytest.raises(InvalidInputError, match="tinker://"):
            call(path)


@pytest.mark.parametrize(("limit", "offset"), [(0, 0), (-1, 0), (5, -1), ("5", 0), (5, None)])
def test_a_page_has_a_size_and_a_place(rest: RestClient, limit: Any, offset: Any) -> None:
    for call in (rest.list_training_runs, rest.list_user_checkpoints, rest.list_sessions):
        with pytest.raises(InvalidInputError, match="limit"):
            call(limit=limit, offset=offset)


@pytest.mark.parametrize("ttl", [0, -5, 1.5, "1h"])
def test_a_ttl_is_checked_at_once(rest: RestClient, ttl: Any) -> None:
    with pytest.raises(InvalidInputError, match="ttl_seconds"):
        rest.set_checkpoint_ttl_from_tinker_path(PATH, ttl)


def test_a_closed_client_says_so(rest: RestClient) -> None:
    rest.close()
    with pytest.raises(ClientClosedError, match="RestClient"):
        rest.list_sessions()
