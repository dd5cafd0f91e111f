"""An engine without machine learning, for tests; numpy only.

Everything it returns is a pure function of the input and of the optimizer steps taken.  Before
the first step it is a proper language model: after token p at position i, eight candidate tokens
(chosen by a hash of p and i) share 95 % of the probability, and the whole vocabulary shares the
rest.  Each optimizer step shrinks every log-probability by the same rule, so any loss on any data
falls.

Text is one character per token: token t decodes to ``chr(t)``.  Token 0 ends a sequence.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
from pathlib import Path
from typing import (
    Any,
    Container,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Union,
)

import numpy as np
import numpy.typing as npt

from tinkex.local.engines.engine import (
    EngineError,
    EngineInfo,
    Finished,
    SampledToken,
    StreamingRequest,
)
from tinkex.local.engines.hash_model import (
    END_OF_SEQUENCE,
    HashModel,
    digest,
    loss,
    mix,
    shares,
)
from tinkex.local.engines.inputs import (
    check_batch,
    check_loss,
    check_sample,
    check_values,
    prompt_targets,
)
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

_SLICE = 8  # tokens per sequence and slice
_STATE_FILE = "deterministic.json"


@dataclasses.dataclass
class _Adapter:
    """The state of an adapter and its optimizer."""

    lora: LoraConfig
    steps: int = 0  # optimizer steps that the weights have taken
    optimizer_steps: int = 0  # Adam's own count; a fresh optimizer restarts it
    gradient: bool = False


class DeterministicEngine:
    """An `Engine` with predictable results, as the module's docstring describes.

    Args:
        model_name: the name clients ask for.
        vocab_size: token ids are less than this.
        context_length: maximum number of tokens of prompt and continuation together.
    """

    def __init__(
        self,
        model_name: str = "deterministic",
        *,
        vocab_size: int = 200_000,
        context_length: int = 32_768,
    ) -> None:
        self._info = EngineInfo(
            model_name=model_name,
            arch="deterministic",
            context_length=context_length,
            vocab_size=vocab_size,
            eos_tokens=(END_OF_SEQUENCE,),
        )
        self._model = HashModel(vocab_size)
        self._adapters: Dict[str, _Adapter] = {}
        self._samplers: Dict[str, int] = {}

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def tokenizer(self) -> Any:
        """None, since token t decodes to ``chr(t)``."""
        return None

    # Training

    def adapted(self, lora: LoraConfig) -> Dict[str, int]:
        """Return an empty dict: this engine has no layers."""
        return {}

    def create(self, model_id: str, lora: LoraConfig) -> None:
        check_values(lora)
        self._adapters[model_id] = _Adapter(lora)

    def unload(self, model_id: str) -> None:
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
        adapter = self._adapter(model_id)
        config = check_loss(loss_fn, loss_fn_config)
        rows = check_batch(data, loss_fn, config, self._info)
        total = 0.0
        outputs: List[Dict[str, TensorData]] = []
        for index, row in enumerate(rows):
            # There may be fewer targets than tokens: they belong to the last tokens
            # (docs/protocol.md, "Losses").
            positions = np.arange(row.tokens.size)[-len(row.targets) :, None]
            tokens = row.tokens[-len(row.targets) :, None].astype(np.int64)
            logprobs = self._model.logprobs(tokens, positions, row.targets, adapter.steps)
            own = loss(loss_fn, logprobs.astype(np.float64), row.inputs, config)
            if not np.isfinite(own):
                raise EngineError(
                    f"datum {index}: the loss is not finite; its logprobs may belong to another "
                    "model or to other tokens"
                )
            total += own
            outputs.append({"logprobs": TensorData.from_numpy(logprobs.reshape(row.shape))})
        if not forward_only:
            adapter.gradient = True
        return ForwardBackwardOutput(
            outputs, {"loss:sum": total}, loss_fn_output_type="TorchLossReturn"
        )

    def optim_step(self, model_id: str, params: AdamParams) -> Dict[str, float]:
        """Count a step if a gradient has accumulated; otherwise change nothing."""
        adapter = self._adapter(model_id)
        check_values(params)
        norm = 1.0 / (1 + adapter.steps) if adapter.gradient else 0.0
        adapter.steps += adapter.gradient
        adapter.optimizer_steps += adapter.gradient
        adapter.gradient = False
        return {"grad_norm:mean": norm, "optimizer_steps:max": float(adapter.optimizer_steps)}

    def save(self, model_id: str, folder: Path, *, with_optimizer: bool) -> None:
        adapter = self._adapter(model_id)
        state = {
            "lora": adapter.lora.to_wire(),
            "steps": adapter.steps,
            "optimizer_steps": adapter.optimizer_steps if with_optimizer else None,
        }
        (folder / _STATE_FILE).write_text(json.dumps(state))

    def export(self, model_id: str, folder: Path) -> None:
        self.save(model_id, folder, with_optimizer=False)

    def load(self, model_id: str, folder: Path, *, with_optimizer: bool) -> None:
        adapter, state = self._adapter(model_id), _read_state(folder)
        optimizer_steps = state["optimizer_steps"] if with_optimizer else 0
        if optimizer_steps is None:
            raise EngineError("the checkpoint holds no optimizer state; load the weights alone")
        adapter.steps, adapter.optimizer_steps = state["steps"], optimizer_steps
        adapter.gradient = False

    def lora_config(self, folder: Path) -> LoraConfig:
        return LoraConfig.from_wire(_read_state(folder)["lora"])

    # Sampling

    def create_sampler(self, sampler_id: str, folder: Optional[Path]) -> None:
        self._samplers[sampler_id] = 0 if folder is None else int(_read_state(folder)["steps"])

    def unload_sampler(self, sampler_id: str) -> None:
        self._samplers.pop(sampler_id, None)

    def sample(
        self,
        sampler_id: str,
        requests: Sequence[SampleRequest],
        dropped: Container[int] = (),
    ) -> Iterator[List[Finished]]:
        """Run *requests* as one batch, eight tokens of each sequence per slice."""
        if sampler_id not in self._samplers:
            raise EngineError(f"sampler {sampler_id} is unknown", "server")
        steps = self._samplers[sampler_id]
        running: Dict[int, List[_Draw]] = {}
        finished: List[Finished] = []
        taken = 0
        while running or taken < len(requests):
            for index in range(taken, len(requests)):
                try:
                    running[index] = self._draws(requests[index], steps)
                except EngineError as error:
                    finished.append((index, error))
            taken = len(requests)
            # Filter after taking requests: one may have been dropped before its first slice.
            running = {index: draws for index, draws in running.items() if index not in dropped}
            for _ in range(_SLICE):
                self._draw_tokens([d for ds in running.values() for d in ds if not d.stop_reason])
            for index, draws in list(running.items()):
                if all(draw.stop_reason for draw in draws):
                    del running[index]
                    finished.append((index, self._response(requests[index], draws, steps)))
            yield finished
            finished = []

    def interrupt(self) -> None:
        """Do nothing, since no call takes long."""

    def close(self) -> None:
        self._adapters.clear()
        self._samplers.clear()

    def _draws(self, request: SampleRequest, steps: int) -> List[_Draw]:
        check_values(request)
        prompt, room = check_sample(request, self._info)
        wanted = request.sampling_params.max_tokens
        most = room if wanted is None else min(wanted, room)
        seed = request.sampling_params.seed
        # Without a seed, the prompt serves as one, so that results stay a function of the request.
        origin = digest(prompt) if seed is None else seed
        chances = shares(request.sampling_params, steps)
        last = int(prompt.size) - 1
        return [
            _Draw(request, i, int(prompt[-1]), last, most, origin + 7919 * i, steps, chances)
            for i in range(request.num_samples)
        ]

    def _draw_tokens(self, draws: Sequence[_Draw]) -> None:
        """Append one token to each of *draws* (all of one sampler), and report it if requested."""
        if not draws:
            return
        previous = np.array([draw.previous for draw in draws])
        positions = np.array([draw.position for draw in draws])
        candidates = self._model.candidates(previous, positions)
        seeds = np.array([draw.seed & 0xFFFFFFFF for draw in draws], dtype=np.uint64)
        # One number in [0, 1) for each sequence and position.
        dice = mix(seeds << np.uint64(32) | positions.astype(np.uint64)) / 2.0**64
        rank = [
            min(bisect.bisect_right(draw.shares, throw * draw.shares[-1]), len(draw.shares) - 1)
            for draw, throw in zip(draws, dice.tolist())
        ]
        chosen = candidates[np.arange(len(draws)), rank]
        logprobs = self._model.logprobs(previous, positions, chosen, draws[0].steps)
        for draw, token, logprob in zip(draws, chosen.tolist(), logprobs.tolist()):
            draw.append(token, logprob)
            if isinstance(draw.request, StreamingRequest) and draw.request.on_token is not None:
                table = self._topk(draw, len(draw.tokens) - 1)
                top = [] if table is None else table.rows()[0] or []
                draw.request.on_token(
                    SampledToken(draw.number, token, logprob, top, draw.stop_reason)
                )

    def _topk(self, draw: _Draw, start: int = 0) -> Optional[TopkLogprobs]:
        """Return the top-k table for generated tokens from *start* on; None if not requested."""
        k = draw.request.topk_sample_logprobs
        if not k:
            return None
        prompt = draw.request.prompt.to_numpy()
        previous = np.array([prompt[-1], *draw.tokens[:-1]][start:], dtype=np.int64)
        return self._model.topk(previous, int(prompt.size) - 1 + start, k, draw.steps)

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
                    topk_logprobs_np=self._topk(draw),
                )
                for draw in draws
            ],
            **self._prompt_facts(request, prompt, steps),
        )

    def _prompt_facts(
        self, request: SampleRequest, prompt: npt.NDArray[np.int32], steps: int
    ) -> Dict[str, Any]:
        """Return what *request* asks about its prompt, by field name of SampleResponse."""
        before = prompt[:-1].astype(np.int64)
        positions = np.arange(before.size, dtype=np.int64)
        facts: Dict[str, Any] = {}
        if request.prompt_logprobs:
            known = self._model.logprobs(before, positions, prompt[1:].astype(np.int64), steps)
            if request.prompt_logprobs_last_n is not None:
                known[: max(0, known.size - request.prompt_logprobs_last_n)] = np.nan
            facts["prompt_logprobs_np"] = np.concatenate(([np.nan], known)).astype(np.float32)
        if request.topk_prompt_logprobs:
            k = request.topk_prompt_logprobs
            table = self._model.topk(before, 0, k, steps)
            # Nothing precedes the first token: its row is empty.
            facts["topk_prompt_logprobs_np"] = TopkLogprobs(
                np.concatenate((np.zeros((1, k), np.int32), table.token_ids)),
                np.concatenate((np.full((1, k), TOPK_SENTINEL, np.float32), table.logprobs)),
            )
        rows = prompt_targets(request, self._info)
        if rows is not None:
            values = self._model.logprobs(before[:, None], positions[:, None], rows, steps)
            values[rows < 0] = 0.0
            facts["target_prompt_logprobs"] = TensorData.from_numpy(values)
        if request.prompt_alt_tokens_k:
            tokens = self._model.candidates(before, positions, request.prompt_alt_tokens_k)
            values = self._model.logprobs(before[:, None], positions[:, None], tokens, steps)
            facts["prompt_alt_tokens"] = PromptAltTokens(
                TensorData.from_numpy(tokens), TensorData.from_numpy(values)
            )
        return facts

    def _adapter(self, model_id: str) -> _Adapter:
        if model_id not in self._adapters:
            raise EngineError(f"model {model_id} is not loaded", "server")
        return self._adapters[model_id]


@dataclasses.dataclass
class _Draw:
    """A continuation that is being generated."""

    request: SampleRequest
    number: int
    previous: int  # the last token so far ...
    position: int  # ... and its position
    most: int  # maximum number of tokens
    seed: int
    steps: int  # optimizer steps of the sampler's adapter
    shares: List[float]
    tokens: List[int] = dataclasses.field(default_factory=list)
    logprobs: List[float] = dataclasses.field(default_factory=list)
    stop_reason: Optional[str] = None

    def append(self, token: int, logprob: float) -> None:
        """Append a drawn token; set the stop reason if it ends the sequence."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.previous, self.position = token, self.position + 1
        request = self.request
        at_eos = isinstance(request, StreamingRequest) and request.stop_at_eos
        if _stops(self.tokens, request.sampling_params.stop) or (
            at_eos and token == END_OF_SEQUENCE
        ):
            self.stop_reason = "stop"
        elif len(self.tokens) >= self.most:
            self.stop_reason = "length"


def _stops(tokens: List[int], stop: Union[str, Sequence[str], Sequence[int], None]) -> bool:
    if stop is None:
        return tokens[-1] == END_OF_SEQUENCE
    for end in [stop] if isinstance(stop, str) else stop:
        if isinstance(end, str):
            if "".join(map(chr, tokens[-len(end) :])) == end:
                return True
        elif end == tokens[-1]:
            return True
    return False


def _read_state(folder: Path) -> Dict[str, Any]:
    try:
        state: Dict[str, Any] = json.loads((folder / _STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise EngineError(
            f"{folder.name} is not a checkpoint of the deterministic engine: {error}"
        ) from error
    return state
