"""Custom losses that the server computes train exactly as those that the client computes."""

from __future__ import annotations

from typing import Any, Dict, List, Tuple

import numpy as np
import pytest
import torch

from tinkex import ServiceClient, types
from tinkex.local import LocalServer
from tinkex.local.settings import ClientFlags, ServerSettings

ADAM = types.AdamParams(learning_rate=0.02, eps=1e-8)
SERVED = ServerSettings(flags=ClientFlags(custom_loss_server_side=True))


def batch() -> List[types.Datum]:
    rng = np.random.default_rng(5)
    data = []
    for length in (7, 3, 12):
        tokens = rng.integers(0, 256, length + 1)
        data.append(
            types.Datum(
                types.ModelInput.from_ints(tokens[:-1]),
                {
                    "target_tokens": tokens[1:],
                    "advantages": rng.normal(size=length).astype(np.float32),
                },
            )
        )
    return data


def entropic(
    logprobs: torch.Tensor, advantages: torch.Tensor
) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
    ratio = torch.exp(logprobs - logprobs.detach())
    clipped = torch.clamp(ratio, 0.8, 1.2)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    loss = -gain.sum() + 0.1 * (logprobs**2).mean()
    return loss, {"custom/lp:mean": logprobs.mean(), "custom/n:sum": torch.ones_like(ratio).sum()}


def test_a_loss_on_the_server_trains_like_the_same_loss_in_the_client(engine: Any) -> None:
    data = batch()
    with LocalServer(engine, settings=SERVED) as server, ServiceClient(base_url=server.url) as s:
        handle = s.create_custom_loss(entropic, {"logprobs": 1, "advantages": 1}).result(60)
        assert handle.loss_id is not None

        def here(batch: Any, rows: Any) -> Any:
            return handle(batch, rows)

        there, ours = (s.create_lora_training_client("tiny-random", rank=4, seed=3) for _ in "ab")
        for _ in range(3):
            served = there.forward_backward_custom(data, handle)
            mine = ours.forward_backward_custom(data, here)
            there.optim_step(ADAM).result(60)
            ours.optim_step(ADAM).result(60)
            for name in ("loss:sum", "custom/lp:mean", "custom/n:sum"):
                assert served.result(0).metrics[name] == pytest.approx(
                    mine.result(0).metrics[name], rel=1e-4
                )
        plain = [
            types.Datum(one.model_input, {"target_tokens": one.loss_fn_inputs["target_tokens"]})
            for one in data
        ]
        served_rows, rows = (
            client.forward(plain, "cross_entropy").result(60).loss_fn_outputs
            for client in (there, ours)
        )
        for one, other in zip(served_rows, rows):
            np.testing.assert_allclose(
                one["logprobs"].to_numpy(), other["logprobs"].to_numpy(), rtol=1e-5, atol=1e-6
            )
