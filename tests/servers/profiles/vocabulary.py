"""An engine that accepts token ids beyond its vocabulary, as some servers do.

It computes with token 0 in their place, and reports NaN for them, or whatever number comes out.
Called from the engine thread only, like the engine it wraps.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Container, Dict, Iterator, List, Mapping, Sequence, Tuple, Union, cast

import numpy as np
import numpy.typing as npt

from tinkex.local.engines.engine import Engine, EngineInfo, Finished
from tinkex.types import (
    Datum,
    ForwardBackwardOutput,
    ModelInput,
    SampleRequest,
    SampleResponse,
    TensorData,
)

Mask = npt.NDArray[np.bool_]


class LenientEngine:
    """Wraps *engine* so that no token id is refused.

    Args:
        engine: does the work.
        tell_nan: logprobs that directly depend on an unknown token are NaN.
    """

    def __init__(self, engine: Engine, *, tell_nan: bool) -> None:
        self._engine = engine
        self._tell_nan = tell_nan
        self._vocab_size = engine.info.vocab_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def info(self) -> EngineInfo:
        """Return the engine's info, with a vocabulary of all token ids."""
        return dataclasses.replace(self._engine.info, vocab_size=1 << 31)

    def forward_backward(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, Union[float, str]],
        *,
        forward_only: bool = False,
    ) -> ForwardBackwardOutput:
        """See Engine."""
        cleaned = [self._clean(datum) for datum in data]
        output = self._engine.forward_backward(
            model_id,
            [datum for datum, _ in cleaned],
            loss_fn,
            loss_fn_config,
            forward_only=forward_only,
        )
        if not self._tell_nan:
            return output
        reported = [
            {**outputs, "logprobs": _blank(outputs["logprobs"], strange)}
            if strange.any() and "logprobs" in outputs
            else outputs
            for outputs, (_, strange) in zip(output.loss_fn_outputs, cleaned)
        ]
        return dataclasses.replace(output, loss_fn_outputs=reported)

    def sample(
        self,
        sampler_id: str,
        requests: Sequence[SampleRequest],
        dropped: Container[int] = (),
    ) -> Iterator[List[Finished]]:
        """See Engine."""
        prompts = [self._known(request.prompt.to_numpy()) for request in requests]
        asked = [
            dataclasses.replace(request, prompt=ModelInput.from_ints(tokens.tolist()))
            if strange.any()
            else request
            for request, (tokens, strange) in zip(requests, prompts)
        ]
        for finished in self._engine.sample(sampler_id, asked, dropped):
            yield [
                (index, self._told(outcome, prompts[index][1]))
                if isinstance(outcome, SampleResponse)
                else (index, outcome)
                for index, outcome in finished
            ]

    def _told(self, response: SampleResponse, strange: Mask) -> SampleResponse:
        logprobs = response.prompt_logprobs_np
        if logprobs is None or not self._tell_nan:
            return response
        return dataclasses.replace(
            response, prompt_logprobs_np=np.where(strange, np.float32(np.nan), logprobs)
        )

    def _clean(self, datum: Datum) -> Tuple[Datum, Mask]:
        """Return the datum with known tokens only, and a mask of its meaningless logprobs."""
        tokens, strange = self._known(datum.model_input.to_numpy())
        inputs: Dict[str, TensorData] = dict(datum.loss_fn_inputs)
        if "target_tokens" in inputs:
            targets, beyond = self._known(inputs["target_tokens"].to_numpy())
            same_rows = beyond.shape[:1] == strange.shape
            strange = (
                beyond | strange.reshape(-1, *[1] * (beyond.ndim - 1)) if same_rows else beyond
            )
            if beyond.any():
                inputs["target_tokens"] = TensorData.from_numpy(targets)
        if not strange.any():
            return datum, strange
        return Datum(ModelInput.from_ints(tokens.tolist()), inputs), strange

    def _known(self, tokens: npt.NDArray[Any]) -> Tuple[npt.NDArray[Any], Mask]:
        strange: Mask = (tokens < 0) | (tokens >= self._vocab_size)
        return np.where(strange, 0, tokens).astype(tokens.dtype), strange


def lenient(engine: Engine, *, tell_nan: bool) -> Engine:
    """Return *engine* wrapped so that no token id is refused."""
    return cast(Engine, LenientEngine(engine, tell_nan=tell_nan))


def _blank(logprobs: TensorData, strange: Mask) -> TensorData:
    return TensorData.from_numpy(
        np.where(strange, np.float32(np.nan), logprobs.to_numpy()).astype(np.float32)
    )
