"""An engine without any machine learning, for tests: numpy only.

Everything it answers is a pure function of the input and of the optimizer steps taken.  Before
the first step it is a proper language model: after token p at position i, eight candidate tokens
(chosen by a hash of p and i) share 95 % of the probability, all tokens the rest.  Each step
shrinks every log-probability by the same rule, so any loss on any data falls.

Its text is one character per token: token t reads ``chr(t)``.  Token 0 ends a sequence.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, TypedDict, Union

import numpy as np
import numpy.typing as npt

from tinkex.errors import InvalidInputError
from tinkex.local.engine import LOSSES, EngineError, EngineInfo, Finished
from tinkex.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    PromptAltTokens,
    SampledSequence,
    SampleRequest,
    SampleResponse,
    TensorData,
    TopkLogprobs,
)
from tinkex.types.sampling import TOPK_SENTINEL

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Inputs = Dict[str, npt.NDArray[Any]]

END_OF_SEQUENCE = 0
_WEIGHTS = np.array([32.0, 16.0, 8.0, 4.0, 2.0, 1.0, 1.0, 0.5])
_WEIGHTS = 0.95 * _WEIGHTS / _WEIGHTS.sum()
_SPREAD = 0.05  # shared by the whole vocabulary
_SLICE = 8  # tokens per sequence and slice
_STATE_FILE = "deterministic.json"


def _mix(values: U64) -> U64:
    """Scramble 64-bit integers (the finalizer of splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclasses.dataclass
class _Adapter:
    """What stands for an adapter and its optimizer."""

    lora: LoraConfig
    steps: int = 0  # weights: optimizer steps taken
    optimizer_steps: int = 0  # Adam's own count; a fresh optimizer starts again
    gradient: bool = False


class DeterministicEngine:
    """An Engine whose answers can be predicted.  See the module's description.

    Args:
        model_name: the name clients ask for.
        vocab_size: token ids lie below this.
        context_length: most tokens of prompt and continuation together.
    """

    def __init__(
        self,
        model_name: str = "deterministic",
        *,
        vocab_size: int = 200_000,
        context_length: int = 32_768,
        tokenizer_id: Optional[str] = None,
    ) -> None:
        self._info = EngineInfo(
            model_name=model_name,
            arch="deterministic",
            context_length=context_length,
            vocab_size=vocab_size,
            tokenizer_id=tokenizer_id,
        )
        self._adapters: Dict[str, _Adapter] = {}
        self._samplers: Dict[str, int] = {}

    @property
    def info(self) -> EngineInfo:
        """What this engine serves."""
        return self._info

    # Training

    def create(self, model_id: str, lora: LoraConfig) -> None:
        """Make a fresh adapter."""
        try:
            lora.check()
        except InvalidInputError as error:
            raise EngineError(str(error)) from error
        self._adapters[model_id] = _Adapter(lora)

    def unload(self, model_id: str) -> None:
        """Forget an adapter."""
        self._adapters.pop(model_id, None)

    def forward_backward(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, Union[float, str]],
        *,
        forward_only: bool = False,
    ) -> ForwardBackwardOutput:
        """Compute loss and logprobs of each datum."""
        adapter = self._adapter(model_id)
        if loss_fn not in LOSSES:
            raise EngineError(f"loss {loss_fn!r} is unknown; there are {', '.join(LOSSES)}")
        if not data:
            raise EngineError("the batch is empty")
        checked = [self._check(index, datum, loss_fn) for index, datum in enumerate(data)]
        total = 0.0
        outputs: List[Dict[str, TensorData]] = []
        for inputs in checked:
            tokens, targets = inputs["tokens"], inputs["target_tokens"]
            positions = np.arange(tokens.size, dtype=np.int64)
            if targets.ndim == 2:
                tokens, positions = tokens[:, None], positions[:, None]
            logprobs = self._logprobs(tokens, positions, targets, adapter.steps)
            total += _loss(loss_fn, logprobs.astype(np.float64), inputs, loss_fn_config)
            outputs.append({"logprobs": TensorData.from_numpy(logprobs)})
        if not forward_only:
            adapter.gradient = True
        return ForwardBackwardOutput(
            outputs, {"loss:sum": total}, loss_fn_output_type="TorchLossReturn"
        )

    def optim_step(self, model_id: str, params: AdamParams) -> Dict[str, float]:
        """Count a step, if there is a gradient to take it with."""
        adapter = self._adapter(model_id)
        try:
            params.check()
        except InvalidInputError as error:
            raise EngineError(str(error)) from error
        norm = 1.0 / (1 + adapter.steps) if adapter.gradient else 0.0
        adapter.steps += adapter.gradient
        adapter.optimizer_steps += adapter.gradient
        adapter.gradient = False
        return {"grad_norm:mean": norm, "optimizer_steps:max": float(adapter.optimizer_steps)}

    def save(self, model_id: str, folder: Path, *, with_optimizer: bool) -> None:
        """Write the adapter's state into *folder*."""
        adapter = self._adapter(model_id)
        state = {
            "lora": adapter.lora.to_wire(),
            "steps": adapter.steps,
            "optimizer_steps": adapter.optimizer_steps if with_optimizer else None,
        }
        (folder / _STATE_FILE).write_text(json.dumps(state))

    def load(self, model_id: str, folder: Path, *, with_optimizer: bool) -> None:
        """Take over a saved state."""
        adapter, state = self._adapter(model_id), _read_state(folder)
        optimizer_steps = state["optimizer_steps"] if with_optimizer else 0
        if optimizer_steps is None:
            raise EngineError("the checkpoint holds no optimizer state; load it without")
        adapter.steps, adapter.optimizer_steps = state["steps"], optimizer_steps
        adapter.gradient = False

    def lora_config(self, folder: Path) -> LoraConfig:
        """Return the configuration of a saved adapter."""
        return LoraConfig.from_wire(_read_state(folder)["lora"])

    # Sampling

    def create_sampler(self, sampler_id: str, folder: Optional[Path]) -> None:
        """Make a sampler of a saved adapter, or of the base model."""
        self._samplers[sampler_id] = 0 if folder is None else int(_read_state(folder)["steps"])

    def unload_sampler(self, sampler_id: str) -> None:
        """Forget a sampler."""
        self._samplers.pop(sampler_id, None)

    def sample(
        self, sampler_id: str, requests: Sequence[SampleRequest]
    ) -> Iterator[List[Finished]]:
        """Run *requests* as one batch, eight tokens of each sequence per slice."""
        if sampler_id not in self._samplers:
            raise EngineError(f"sampler {sampler_id} is unknown", "server")
        return self._slices(self._samplers[sampler_id], requests)

    def close(self) -> None:
        """Forget everything."""
        self._adapters.clear()
        self._samplers.clear()

    def _slices(self, steps: int, requests: Sequence[SampleRequest]) -> Iterator[List[Finished]]:
        running: Dict[int, List[_Draw]] = {}
        finished: List[Finished] = []
        for index, request in enumerate(requests):
            try:
                running[index] = self._draws(request, steps)
            except (EngineError, InvalidInputError) as error:
                finished.append((index, EngineError(str(error))))
        while running:
            for index, draws in list(running.items()):
                for draw in draws:
                    for _ in range(_SLICE):
                        if draw.stop_reason is None:
                            self._draw_token(draw)
                if all(draw.stop_reason for draw in draws):
                    del running[index]
                    finished.append((index, self._response(requests[index], draws, steps)))
            yield finished
            finished = []
        if finished:
            yield finished

    def _draws(self, request: SampleRequest, steps: int) -> List[_Draw]:
        request.sampling_params.check()
        prompt = request.prompt.to_numpy()
        if request.num_samples < 1:
            raise EngineError(f"num_samples is {request.num_samples}; it must be at least 1")
        self._check_tokens(prompt, "the prompt")
        room = self._info.context_length - prompt.size
        wanted = request.sampling_params.max_tokens
        if room < 1:
            raise EngineError(
                f"the prompt has {prompt.size} tokens; the context of "
                f"{self._info.context_length} leaves no room for a continuation"
            )
        most = room if wanted is None else min(wanted, room)
        seed = request.sampling_params.seed
        origin = _digest(prompt) if seed is None else seed
        return [
            _Draw(request, int(prompt[-1]), int(prompt.size), most, origin + 7919 * i, steps)
            for i in range(request.num_samples)
        ]

    def _draw_token(self, draw: _Draw) -> None:
        """Append one token to *draw*, and note why it ends, if it does."""
        params = draw.request.sampling_params
        tokens, weights = self._candidates(
            np.array([draw.previous]), np.array([draw.position]), params.top_k
        )
        token = _pick(tokens[0], weights[0], params.temperature, params.top_p, draw)
        where = (np.array([draw.previous]), np.array([draw.position]), np.array([token]))
        draw.logprobs.append(float(self._logprobs(*where, draw.steps)[0]))
        draw.tokens.append(token)
        draw.previous, draw.position = token, draw.position + 1
        if _stops(draw.tokens, params.stop):
            draw.stop_reason = "stop"
        elif len(draw.tokens) >= draw.most:
            draw.stop_reason = "length"

    def _response(
        self, request: SampleRequest, draws: Sequence[_Draw], steps: int
    ) -> SampleResponse:
        prompt = request.prompt.to_numpy()
        return SampleResponse(
            sequences=[
                SampledSequence(
                    str(draw.stop_reason),
                    np.array(draw.tokens, dtype=np.int32),
                    np.array(draw.logprobs, dtype=np.float32),
                    topk_logprobs_np=self._topk(
                        [int(prompt[-1]), *draw.tokens[:-1]],
                        int(prompt.size),
                        request.topk_sample_logprobs,
                        steps,
                    ),
                )
                for draw in draws
            ],
            **self._prompt_facts(request, prompt, steps),
        )

    def _prompt_facts(
        self, request: SampleRequest, prompt: npt.NDArray[np.int32], steps: int
    ) -> _PromptFacts:
        before = prompt[:-1].astype(np.int64)
        positions = np.arange(before.size, dtype=np.int64)
        facts: _PromptFacts = {}
        if request.prompt_logprobs:
            known = self._logprobs(before, positions, prompt[1:].astype(np.int64), steps)
            if request.prompt_logprobs_last_n is not None:
                known[: max(0, known.size - request.prompt_logprobs_last_n)] = np.nan
            facts["prompt_logprobs_np"] = np.concatenate(([np.nan], known)).astype(np.float32)
        if request.topk_prompt_logprobs:
            table = self._topk(before.tolist(), 0, request.topk_prompt_logprobs, steps)
            facts["topk_prompt_logprobs_np"] = _with_empty_row(table, request.topk_prompt_logprobs)
        if request.target_prompt_logprobs is not None:
            asked = request.target_prompt_logprobs
            rows = asked.to_numpy(pad_value=-1)
            if rows.ndim != 2 or rows.shape[0] != before.size:
                raise EngineError(
                    f"target_prompt_logprobs has shape {asked.shape}; it needs {before.size} rows, "
                    "one per prompt token except the first"
                )
            values = self._logprobs(before[:, None], positions[:, None], rows, steps)
            values[rows < 0] = 0.0
            facts["target_prompt_logprobs"] = TensorData.from_numpy(values)
        if request.prompt_alt_tokens_k:
            tokens, _ = self._candidates(before, positions, request.prompt_alt_tokens_k)
            values = self._logprobs(before[:, None], positions[:, None], tokens, steps)
            facts["prompt_alt_tokens"] = PromptAltTokens(
                TensorData.from_numpy(tokens), TensorData.from_numpy(values)
            )
        return facts

    def _topk(
        self, previous: Sequence[int], first_position: int, k: int, steps: int
    ) -> Optional[TopkLogprobs]:
        if not k:
            return None
        before = np.array(previous, dtype=np.int64)
        positions = first_position + np.arange(before.size, dtype=np.int64)
        tokens, _ = self._candidates(before, positions, k)
        logprobs = self._logprobs(before[:, None], positions[:, None], tokens, steps)
        ids = np.zeros((before.size, k), dtype=np.int32)
        values = np.full((before.size, k), TOPK_SENTINEL, dtype=np.float32)
        ids[:, : tokens.shape[1]] = tokens
        values[:, : tokens.shape[1]] = logprobs
        return TopkLogprobs(ids, values)

    # The model

    def _candidates(self, previous: I64, positions: I64, top_k: int) -> Tuple[I64, F32]:
        """Return the candidate tokens after each token, likeliest first, and their weights."""
        count = len(_WEIGHTS) if top_k < 1 else min(top_k, len(_WEIGHTS))
        seeds = _mix(
            previous.astype(np.uint64) * np.uint64(1_000_003) + positions.astype(np.uint64)
        )
        rank = np.arange(count, dtype=np.uint64)
        hashes = _mix(seeds[:, None] + rank[None, :] * np.uint64(0x9E3779B97F4A7C15))
        # Never the end token, but for the last and least likely candidate.
        tokens = 1 + (hashes % np.uint64(self._info.vocab_size - 1)).astype(np.int64)
        if count == len(_WEIGHTS):
            tokens[:, -1] = END_OF_SEQUENCE
        weights = np.broadcast_to(_WEIGHTS[:count], tokens.shape).astype(np.float32)
        return tokens, weights

    def _logprobs(self, previous: I64, positions: I64, targets: I64, steps: int) -> F32:
        """Log-probability of *targets*; the arguments broadcast against each other."""
        previous, positions, targets = np.broadcast_arrays(previous, positions, targets)
        tokens, weights = self._candidates(previous.reshape(-1), positions.reshape(-1), -1)
        hit = tokens == targets.reshape(-1, 1)
        probability = (weights * hit).sum(axis=1) + _SPREAD / self._info.vocab_size
        shrunk = np.log(probability) / (1.0 + 0.1 * steps)
        result: F32 = shrunk.reshape(targets.shape).astype(np.float32)
        return result

    def _adapter(self, model_id: str) -> _Adapter:
        if model_id not in self._adapters:
            raise EngineError(f"model {model_id} is not loaded", "server")
        return self._adapters[model_id]

    def _check_tokens(self, tokens: npt.NDArray[np.int32], what: str) -> None:
        if not tokens.size:
            raise EngineError(f"{what} is empty")
        if tokens.size > self._info.context_length:
            raise EngineError(
                f"{what} has {tokens.size} tokens; the context is {self._info.context_length}"
            )
        if int(tokens.max()) >= self._info.vocab_size or int(tokens.min()) < 0:
            raise EngineError(
                f"{what} holds token {int(tokens.max())}; "
                f"the vocabulary ends at {self._info.vocab_size - 1}"
            )

    def _check(self, index: int, datum: Datum, loss_fn: str) -> Inputs:
        """Return the datum's arrays, or say what is wrong with it."""
        try:
            tokens = datum.model_input.to_numpy()
        except InvalidInputError as error:
            raise EngineError(f"datum {index}: {error}") from error
        self._check_tokens(tokens, f"datum {index}")
        inputs = {name: tensor.to_numpy() for name, tensor in datum.loss_fn_inputs.items()}
        needed = (
            ["target_tokens"]
            if loss_fn == "cross_entropy"
            else ["target_tokens", "logprobs", "advantages"]
        )
        for name in needed:
            if name not in inputs:
                raise EngineError(f"datum {index}: loss {loss_fn} needs the input {name!r}")
        targets = inputs["target_tokens"]
        if targets.shape[:1] != tokens.shape:
            raise EngineError(
                f"datum {index}: target_tokens has {targets.shape[0] if targets.ndim else 0} rows "
                f"for {tokens.size} input tokens; they must be equally long"
            )
        for name, values in inputs.items():
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise EngineError(f"datum {index}: loss input {name!r} holds NaN or infinity")
            if values.shape != targets.shape:
                raise EngineError(
                    f"datum {index}: loss input {name!r} has shape {values.shape}, "
                    f"target_tokens {targets.shape}"
                )
        self._check_tokens(targets.reshape(-1), f"datum {index}: target_tokens")
        return {**inputs, "tokens": tokens.astype(np.int64)}


class _PromptFacts(TypedDict, total=False):
    """What was asked about the prompt, under the names of SampleResponse."""

    prompt_logprobs_np: F32
    topk_prompt_logprobs_np: TopkLogprobs
    target_prompt_logprobs: TensorData
    prompt_alt_tokens: PromptAltTokens


@dataclasses.dataclass
class _Draw:
    """One continuation in the making."""

    request: SampleRequest
    previous: int
    position: int  # of the token that is drawn next, less one: where *previous* stands
    most: int
    seed: int
    steps: int
    tokens: List[int] = dataclasses.field(default_factory=list)
    logprobs: List[float] = dataclasses.field(default_factory=list)
    stop_reason: Optional[str] = None

    def __post_init__(self) -> None:
        self.position -= 1  # the last prompt token stands at length - 1


def _pick(tokens: I64, weights: F32, temperature: float, top_p: float, draw: _Draw) -> int:
    """Choose among the candidates: the likeliest at temperature 0, else by a hash as a dice."""
    if temperature == 0:
        return int(tokens[0])
    # Log space, and steps sharpen as they do the log-probabilities' spread.
    scores = np.log(weights.astype(np.float64)) * (1.0 + 0.1 * draw.steps) / temperature
    chances = np.exp(scores - scores.max())
    chances /= chances.sum()
    kept = np.cumsum(chances) - chances < top_p
    cumulative = np.cumsum(np.where(kept, chances, 0.0))
    where = np.array([(draw.seed & 0xFFFFFFFF) << 32 | draw.position], dtype=np.uint64)
    dice = float(_mix(where)[0]) / 2.0**64 * cumulative[-1]
    return int(tokens[min(int(np.searchsorted(cumulative, dice, side="right")), tokens.size - 1)])


def _stops(tokens: List[int], stop: Union[str, Sequence[str], Sequence[int], None]) -> bool:
    if stop is None:
        return tokens[-1] == END_OF_SEQUENCE
    ends = [stop] if isinstance(stop, str) else list(stop)
    text = "".join(map(chr, tokens)) if any(isinstance(end, str) for end in ends) else ""
    return any(end in text if isinstance(end, str) else end == tokens[-1] for end in ends)


def _with_empty_row(table: Optional[TopkLogprobs], k: int) -> TopkLogprobs:
    """Put a row that says "not known" before *table*: nothing precedes the first token."""
    assert table is not None
    ids = np.zeros((1, k), dtype=np.int32)
    values = np.full((1, k), TOPK_SENTINEL, dtype=np.float32)
    return TopkLogprobs(
        np.concatenate((ids, table.token_ids)), np.concatenate((values, table.logprobs))
    )


def _digest(tokens: npt.NDArray[np.int32]) -> int:
    """A number that depends on every token and its place."""
    places = np.arange(tokens.size, dtype=np.uint64) << np.uint64(32)
    return int(np.bitwise_xor.reduce(_mix(tokens.astype(np.uint64) | places)))


def _loss(
    name: str,
    logprobs: npt.NDArray[np.float64],
    inputs: Inputs,
    config: Mapping[str, Union[float, str]],
) -> float:
    """Sum a loss over the tokens of a datum (definitions: tinkex.local.torch_engine.losses)."""
    if name == "cross_entropy":
        return float(-(logprobs * inputs.get("weights", np.ones_like(logprobs))).sum())
    old, advantages = inputs["logprobs"], inputs["advantages"]
    weights = inputs.get("weights", np.ones_like(logprobs))
    difference = logprobs - old
    ratio = np.exp(difference)
    low = float(config.get("clip_low_threshold", 0.8))
    high = float(config.get("clip_high_threshold", 1.2))
    if name == "importance_sampling":
        per_token = -ratio * advantages
    elif name == "ppo":
        per_token = -np.minimum(ratio * advantages, np.clip(ratio, low, high) * advantages)
    elif name == "cispo":
        per_token = -np.clip(ratio, low, high) * advantages * logprobs
    else:  # dro
        beta = float(config.get("beta", 0.05))
        per_token = -(logprobs * advantages - 0.5 * beta * difference**2)
    return float((per_token * weights).sum())


def _read_state(folder: Path) -> Dict[str, Any]:
    try:
        state: Dict[str, Any] = json.loads((folder / _STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise EngineError(
            f"{folder.name} is not a checkpoint of the deterministic engine: {error}"
        ) from error
    return state
