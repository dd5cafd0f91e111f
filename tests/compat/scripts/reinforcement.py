"""Reinforcement learning: sample, reward, train by importance sampling, sample the new weights.

The reward is the share of even tokens.  Written for the official SDK.  Prints its results as one
line of JSON.
"""

import json
import os

import numpy as np
import tinker

types = tinker.types
NEWER = os.environ["SCRIPT_STYLE"] == "newer"

PROMPTS = [list(b"one two "), list(b"red green "), list(b"up ")]
GROUP = 4
MAX_TOKENS = 6


def client(created):
    """What a creator returns is the client (older style), or a future of it (newer style)."""
    return created.result() if NEWER else created


def reward(tokens):
    return sum(token % 2 == 0 for token in tokens) / len(tokens)


def datum(prompt, sequence, advantage):
    tokens = prompt + list(sequence.tokens)
    given = len(prompt) - 1  # positions that predict a token of the prompt
    logprobs = np.array([0.0] * given + list(sequence.logprobs), dtype=np.float32)
    advantages = np.array([0.0] * given + [advantage] * len(sequence.tokens), dtype=np.float32)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens=tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData.from_numpy(np.array(tokens[1:], dtype=np.int64)),
            "logprobs": types.TensorData.from_numpy(logprobs),
            "advantages": types.TensorData.from_numpy(advantages),
        },
    )


def rollouts(sampler, iteration):
    """Sample a group for each prompt, concurrently; return the data and the rewards."""
    futures = []
    for number, prompt in enumerate(PROMPTS):
        params = types.SamplingParams(
            max_tokens=MAX_TOKENS, temperature=1.0, seed=10 * iteration + number, stop=[]
        )
        model_input = types.ModelInput.from_ints(prompt)
        futures.append(sampler.sample(model_input, num_samples=GROUP, sampling_params=params))
    data, rewards = [], []
    for prompt, future in zip(PROMPTS, futures):
        sequences = future.result().sequences
        group = [reward(one.tokens) for one in sequences]
        rewards += group
        baseline = sum(group) / len(group)
        data += [datum(prompt, one, got - baseline) for one, got in zip(sequences, group)]
    return data, rewards


def main(service):
    model = service.get_server_capabilities().supported_models[0].model_name
    trainer = client(service.create_lora_training_client(base_model=model, rank=16))
    history = []
    for iteration in range(3):
        sampler = client(trainer.save_weights_and_get_sampling_client())
        data, rewards = rollouts(sampler, iteration)
        passed = trainer.forward_backward(data, "importance_sampling")
        stepped = trainer.optim_step(types.AdamParams(learning_rate=1e-2, beta2=0.99))
        output = passed.result()
        history.append(
            {
                "rewards": rewards,
                "loss": output.metrics["loss:sum"],
                "logprobs": [one["logprobs"].tolist() for one in output.loss_fn_outputs[:2]],
                "metrics": sorted((stepped.result().metrics or {}).items()),
            }
        )
    sampler = client(trainer.save_weights_and_get_sampling_client())
    greedy = types.SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, stop=[])
    answer = sampler.sample(types.ModelInput.from_ints(PROMPTS[0]), 1, greedy).result()
    return {
        "history": history,
        "greedy": answer.sequences[0].tokens,
        "base_model": sampler.get_base_model(),
    }


if NEWER:
    with tinker.ServiceClient() as opened:
        results = main(opened)
else:
    results = main(tinker.ServiceClient())
print(json.dumps(results))
