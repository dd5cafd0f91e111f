"""Checkpoint housekeeping: save, list, limit, publish, inspect, delete, and resume identically.

Written for the official SDK.  Prints its results as one line of JSON.
"""

import json
import os

import tinker

types = tinker.types
NEWER = os.environ["SCRIPT_STYLE"] == "newer"


def client(created):
    """What a creator returns is the client (older style), or a future of it (newer style)."""
    return created.result() if NEWER else created


def train(trainer, steps):
    """Train on one sentence; return the losses, and the optimizer's metrics."""
    tokens = list(b"keep what matters")
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )
    reported = []
    for _ in range(steps):
        passed = trainer.forward_backward([datum], "cross_entropy")
        stepped = trainer.optim_step(types.AdamParams(learning_rate=0.03)).result()
        reported.append([passed.result().metrics["loss:sum"], stepped.metrics])
    return reported


def described(checkpoint):
    return [
        checkpoint.checkpoint_id,
        checkpoint.checkpoint_type,
        checkpoint.public,
        checkpoint.expires_at is not None,
    ]


def refusal(future):
    """The name of the error, and its status."""
    try:
        future.result()
    except tinker.APIStatusError as error:
        return [type(error).__name__, error.status_code]
    return None


def main(service, rest):
    model = service.get_server_capabilities().supported_models[0].model_name
    trainer = client(
        service.create_lora_training_client(model, rank=4, user_metadata={"purpose": "tidy"})
    )
    run_id = trainer.get_info().model_id

    def listed():
        return sorted(described(one) for one in rest.list_checkpoints(run_id).result().checkpoints)

    results = {"first": train(trainer, 3)}
    kept = trainer.save_state("kept").result().path
    short = trainer.save_state("short", ttl_seconds=7200).result().path
    trainer.save_weights_for_sampler("shown").result()
    results["saved"] = listed()

    run = rest.get_training_run(run_id).result()
    shown = run.last_sampler_checkpoint.tinker_path
    results["run"] = [run.base_model, run.is_lora, run.lora_rank, run.user_metadata]
    info = rest.get_weights_info_by_tinker_path(kept).result()
    results["info"] = [info.base_model, info.is_lora, info.lora_rank]

    rest.publish_checkpoint_from_tinker_path(shown).result()
    rest.set_checkpoint_ttl_from_tinker_path(kept, 86400).result()
    rest.set_checkpoint_ttl_from_tinker_path(short, None).result()
    results["changed"] = listed()
    rest.unpublish_checkpoint_from_tinker_path(shown).result()
    rest.delete_checkpoint_from_tinker_path(short).result()
    results["tidied"] = listed()
    results["gone"] = refusal(rest.get_weights_info_by_tinker_path(short))
    mine = [one.tinker_path for one in rest.list_user_checkpoints(limit=50).result().checkpoints]
    results["mine"] = [kept in mine, shown in mine, short in mine]

    results["ahead"] = train(trainer, 3)
    resumed = client(service.create_training_client_from_state_with_optimizer(kept))
    results["resumed"] = train(resumed, 3)
    fresh = client(service.create_training_client_from_state(kept))
    results["fresh"] = train(fresh, 3)
    trainer.save_state("kept", overwrite=True).result()
    overwritten = client(service.create_training_client_from_state_with_optimizer(kept))
    results["overwritten"] = [train(overwritten, 2), train(trainer, 2)]
    parsed = types.ParsedCheckpointTinkerPath.from_tinker_path(kept)
    results["parsed"] = [parsed.training_run_id == run_id, parsed.checkpoint_type]
    return results


if NEWER:
    with tinker.ServiceClient(display_name="housekeeping") as opened:
        results = main(opened, tinker.RestClient())
else:
    opened = tinker.ServiceClient()
    results = main(opened, opened.create_rest_client())
print(json.dumps(results))
