"""Supervised fine-tuning: train on a few sentences, evaluate, save, and sample what was learnt.

Written for the official SDK.  Prints its results as one line of JSON.
"""

import json
import os

import tinker

types = tinker.types
NEWER = os.environ["SCRIPT_STYLE"] == "newer"

SENTENCES = ["the cat sat on the mat", "a dog lay in the sun", "birds sing at dawn"]
HELD_OUT = ["the dog sat in the sun"]


def client(created):
    """What a creator returns is the client (older style), or a future of it (newer style)."""
    return created.result() if NEWER else created


def datum(text):
    tokens = list(text.encode())
    weights = [0.0, 0.0] + [1.0] * (len(tokens) - 3)  # not the first two letters
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights},
    )


def mean_loss(output, data):
    """Per weighted token, from the logprobs."""
    total = weight = 0.0
    for example, outputs in zip(data, output.loss_fn_outputs):
        logprobs = outputs["logprobs"].to_numpy()
        weights = example.loss_fn_inputs["weights"].to_numpy()
        total -= float((logprobs * weights).sum())
        weight += float(weights.sum())
    return total / weight


def main(service):
    models = [one.model_name for one in service.get_server_capabilities().supported_models]
    trainer = client(service.create_lora_training_client(base_model=models[0], rank=8, seed=7))
    info = trainer.get_info()
    train = [datum(text) for text in SENTENCES]
    held_out = [datum(text) for text in HELD_OUT]

    before = mean_loss(trainer.forward(held_out, "cross_entropy").result(), held_out)
    losses = []
    for step in range(6):
        rate = 0.05 * (1 - step / 10)
        passed = trainer.forward_backward(train, loss_fn="cross_entropy")
        stepped = trainer.optim_step(types.AdamParams(learning_rate=rate, grad_clip_norm=1.0))
        losses.append(passed.result().metrics["loss:sum"])
        stepped.result(timeout=60)
    after = mean_loss(trainer.forward(held_out, "cross_entropy").result(), held_out)

    state = trainer.save_state(name="final").result()
    weights = trainer.save_weights_for_sampler(name="final").result()
    sampler = client(service.create_sampling_client(model_path=weights.path))
    prompt = types.ModelInput.from_ints(list(b"the "))
    params = types.SamplingParams(max_tokens=8, temperature=0.7, top_p=0.9, seed=3, stop=[])
    answer = sampler.sample(prompt=prompt, num_samples=2, sampling_params=params).result()
    scores = sampler.compute_logprobs(types.ModelInput.from_ints(list(b"the cat"))).result()
    return {
        "base_model": info.model_data.model_name,
        "rank": info.lora_rank,
        "losses": losses,
        "held_out": [before, after],
        "state": state.path.split("/")[-2:],
        "weights": weights.path.split("/")[-2:],
        "tokens": [one.tokens for one in answer.sequences],
        "logprobs": [one.logprobs for one in answer.sequences],
        "stop_reasons": [one.stop_reason for one in answer.sequences],
        "scores": scores,
    }


if NEWER:
    with tinker.ServiceClient(user_metadata={"example": "supervised"}) as opened:
        results = main(opened)
else:
    results = main(tinker.ServiceClient(user_metadata={"example": "supervised"}))
print(json.dumps(results))
