"""Cheap checks of a submission, made in the HTTP thread before it is queued.

Each raises an HTTPError (400) that says what is wrong.  The engine checks the rest: shapes, input
names, and whatever only it knows.
"""

from __future__ import annotations

import math
import re
from typing import Any, Dict, Optional, Sequence

from tinkex.local.engines import inputs
from tinkex.local.engines.engine import EngineError, EngineInfo
from tinkex.local.engines.inputs import LOSSES, check_tokens, check_vocabulary
from tinkex.local.errors import HTTPError, invalid_input_rejected
from tinkex.local.settings import SamplingLimits
from tinkex.types import Datum, LoraConfig, SampleRequest

#: Most numbers that one request may ask for, or that its tensors may hold once they are dense:
#: half a gigabyte.
_MAX_CELLS = 1 << 26

_MAX_STOPS = 1024
_MAX_RANK = 4096

# A name becomes a folder (state/checkpoints.py): no slash; no leading dot, which marks folders that
# are being written; and no ~, which marks later versions under the same name.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+@,-]{0,127}")


def check_pass(info: EngineInfo, loss_fn: str, data: Sequence[Datum]) -> None:
    """Check the batch and the loss of a forward or forward_backward."""
    if loss_fn == "stable_reinforce":
        raise HTTPError(
            400,
            "loss 'stable_reinforce' is not offered here: its definition is not public; use "
            "importance_sampling, ppo, cispo or gspo",
        )
    if loss_fn not in LOSSES:
        raise HTTPError(400, f"loss {loss_fn!r} is unknown; there are {', '.join(LOSSES)}")
    if not data:
        raise HTTPError(400, "the batch is empty; send at least one datum")
    cells = 0
    for index, datum in enumerate(data):
        try:
            # By shape: a sparse tensor of a few bytes may be gigabytes once it is dense.
            cells += sum(math.prod(tensor.shape) for tensor in datum.loss_fn_inputs.values())
            if cells > _MAX_CELLS:
                raise EngineError(
                    "the loss inputs of the datums up to this one have more than "
                    f"{_MAX_CELLS} cells as dense tensors; send smaller batches"
                )
            check_tokens(datum.model_input, info)
            targets = datum.loss_fn_inputs.get("target_tokens")
            if targets is not None and targets.values.size:
                check_vocabulary("target_tokens", targets.values, info)
        except EngineError as error:
            raise HTTPError(400, f"datum {index}: {error}") from error


def check_sample(info: EngineInfo, request: SampleRequest, limits: SamplingLimits) -> int:
    """Check a sample request and return its size: most tokens of prompt and continuations."""
    if request.num_samples > limits.max_num_samples:
        raise HTTPError(
            400,
            f"num_samples is {request.num_samples}; it must be at most {limits.max_num_samples}: "
            "send several requests",
        )
    stop = request.sampling_params.stop
    if stop is not None and not isinstance(stop, str) and len(stop) > _MAX_STOPS:
        raise HTTPError(400, f"stop has {len(stop)} entries; it must have at most {_MAX_STOPS}")
    try:
        prompt, room = inputs.check_sample(request, info)
    except EngineError as error:
        raise HTTPError(400, str(error)) from error
    # An upper bound, since batches are filled by size before anything is sampled.  Without
    # max_tokens a continuation may fill the context.
    sampled = request.num_samples * min(request.sampling_params.max_tokens or room, room)
    _check_cells(request, int(prompt.size), sampled)
    return request.num_samples * int(prompt.size) + sampled


def _check_cells(request: SampleRequest, prompt: int, sampled: int) -> None:
    """Check the size of the response, and of what it is computed from."""
    cells = prompt * (request.topk_prompt_logprobs + request.prompt_alt_tokens_k)
    cells += sampled * request.topk_sample_logprobs
    if request.target_prompt_logprobs is not None:
        cells += math.prod(request.target_prompt_logprobs.shape)
    if cells > _MAX_CELLS:
        raise HTTPError(
            400,
            f"the request asks for {cells} log-probabilities; at most {_MAX_CELLS} are allowed: "
            "ask for fewer at each position, or for fewer positions",
        )


def check_checkpoint_name(name: str) -> str:
    """Return *name* if it is a valid name for a checkpoint."""
    if not _NAME.fullmatch(name):
        raise HTTPError(
            400,
            f"{name!r:.150} is not a checkpoint name; use 1 to 128 letters, digits and "
            "_ . = + @ , -, beginning with a letter, digit or _ (a name, not a tinker:// path)",
        )
    return name


def check_lora(lora: LoraConfig) -> None:
    """Check the adapter of a new run."""
    with invalid_input_rejected():
        lora.check()
    if lora.rank > _MAX_RANK:
        raise HTTPError(400, f"LoRA rank is {lora.rank}; it must be at most {_MAX_RANK}")


def check_optimizer(config: Optional[Dict[str, Any]]) -> None:
    """Check the optimizer a run is created with."""
    kind = (config or {}).get("type", "adamw")
    if kind != "adamw":
        raise HTTPError(400, f"optimizer {kind!r} is not offered here; this server has adamw")
