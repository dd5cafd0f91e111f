"""TorchEngine: the embedded server's engine, built on torch, transformers and peft.

Owned by the server's scheduler, which calls it from one thread; it starts no thread of its own
(torch's pool does the computing).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import (
    Any,
    Callable,
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
import torch

from tinkex.local.engines import models
from tinkex.local.engines.engine import EngineError, EngineInfo, Finished
from tinkex.local.engines.inputs import check_batch, check_loss, check_values
from tinkex.local.engines.torch_engine import adapter_files
from tinkex.local.engines.torch_engine.adam import Adam, global_norm
from tinkex.local.engines.torch_engine.adapters import Adapter, AdapterPool
from tinkex.local.engines.torch_engine.loading import load_network
from tinkex.local.engines.torch_engine.network import Network
from tinkex.local.engines.torch_engine.sampling import SampleRun
from tinkex.local.engines.torch_engine.stopping import Vocabulary
from tinkex.local.engines.torch_engine.training import BatchResult, metrics_of, run_batch
from tinkex.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    SampleRequest,
    TensorData,
)

logger = logging.getLogger(__name__)

OPTIMIZER_WEIGHTS = "optimizer.safetensors"
OPTIMIZER_FILE = "optimizer.json"

_CONTEXT_IF_UNKNOWN = 2048


@dataclasses.dataclass(eq=False)
class _Run:
    """One training run: its adapter, and the adapter's optimizer."""

    lora: LoraConfig
    adapter: Adapter
    optimizer: Adam


class TorchEngine:
    """One base model with LoRA adapters to train and to sample from.

    `Engine` describes the methods; their docstrings here say what is particular to this engine.

    Gradients: ``forward_backward`` adds to the accumulated gradient, ``optim_step`` uses it up,
    ``load`` drops it, and ``save`` does not store it.  A pass that fails leaves it unchanged.

    Numbers: adapters, gradients, optimizer, logits and losses are float32; the base is float32
    on the CPU and bfloat16 on a GPU unless *dtype* is given.
    """

    def __init__(self, network: Network, tokenizer: Any, info: EngineInfo) -> None:
        self._network = network
        self._interruption = network.interruption
        self._vocabulary = Vocabulary.of(network.model, tokenizer)
        self._info = dataclasses.replace(
            info, eos_tokens=tuple(sorted(self._vocabulary.eos_tokens))
        )
        self._pool = AdapterPool(network.model, info.model_name, info.tokenizer_id)
        self._runs: Dict[str, _Run] = {}
        self._samplers: Dict[str, Optional[Adapter]] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        device: str = "auto",
        cache_dir: Optional[Path] = None,
        dtype: Union[str, torch.dtype, None] = None,
        progress: Optional[Callable[[str], None]] = None,
    ) -> TorchEngine:
        """Load *model* (``smollm2-135m``, ``tiny-random``, a folder, a Hugging Face name).

        *device* is ``auto`` (a GPU if there is one), ``cpu``, ``cuda``...; *dtype* applies to the
        base's weights.  *progress* gets one line before each slow step.  Blocks: about 5 s for
        smollm2-135m once it is cached.

        Raises:
            LocalServerError: the model cannot be loaded, or cannot be moved to the device.
        """
        started = time.monotonic()
        resolved = models.resolve(model, cache_dir=cache_dir, progress=progress)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype is None:
            # Many CPUs have no bfloat16 arithmetic.
            dtype = torch.float32 if device == "cpu" else torch.bfloat16
        elif isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        network, tokenizer = load_network(resolved.source, device, dtype, model)
        # The folder is an alias, too: with it, programs that load the tokenizer by the model's
        # name, as those of the official client do, need no model hub.
        folder = (resolved.source,) if resolved.source != resolved.name else ()
        info = EngineInfo(
            model_name=resolved.name,
            arch=type(network.model).__name__,
            context_length=_context_length(network.model.config.get_text_config(), tokenizer),
            vocab_size=network.vocab_size,
            tokenizer_id=resolved.source,
            aliases=(*resolved.aliases, *folder),
        )
        seconds = time.monotonic() - started
        logger.info("loaded %s (%s) on %s in %.1f s", model, info.arch, device, seconds)
        return cls(network, tokenizer, info)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def tokenizer(self) -> Any:
        return self._vocabulary.tokenizer

    # --- training runs -------------------------------------------------------------------------

    def adapted(self, lora: LoraConfig) -> Dict[str, int]:
        # Called from any thread, even while another one closes the engine.
        pool: Optional[AdapterPool] = self.__dict__.get("_pool")
        return {} if pool is None else pool.adapted(lora).counts()

    def create(self, model_id: str, lora: LoraConfig) -> None:
        check_values(lora)
        if model_id in self._runs:
            raise EngineError(f"model {model_id} exists already")
        adapter = self._pool.add(self._pool.make_config(lora), lora.seed)
        names = ", ".join(f"{name} ({count})" for name, count in self.adapted(lora).items())
        logger.info("%s: an adapter of rank %d on %s", model_id, lora.rank, names)
        self._runs[model_id] = _Run(lora, adapter, Adam(adapter.parameters))

    def unload(self, model_id: str) -> None:
        run = self._runs.pop(model_id, None)
        if run is not None:
            self._pool.remove(run.adapter)

    def forward_backward(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, Union[float, str]],
        *,
        forward_only: bool = False,
    ) -> ForwardBackwardOutput:
        """See `Engine`; `training.metrics_of` for the metrics, `losses` for the losses."""
        run = self._run(model_id)
        config = check_loss(loss_fn, loss_fn_config)
        rows = check_batch(data, loss_fn, config, self._info)
        self._pool.activate(run.adapter)
        # Set the accumulated gradient aside, so that a pass that fails halfway leaves it unchanged,
        # and so that the check below sees the gradient of this pass alone.
        before = [(p, p.grad) for p in run.adapter.parameters.values()]
        for parameter, _ in before:
            parameter.grad = None
        try:
            result = run_batch(self._network, rows, loss_fn, config, backward=not forward_only)
            _check_finite(result, [p.grad for p, _ in before if p.grad is not None])
        except BaseException:
            for parameter, gradient in before:
                parameter.grad = gradient
            raise
        for parameter, gradient in before:
            if parameter.grad is None:
                parameter.grad = gradient
            elif gradient is not None:
                parameter.grad.add_(gradient)
        outputs = [
            {"logprobs": TensorData.from_numpy(logprobs.reshape(row.shape))}
            for row, logprobs in zip(rows, result.logprobs)
        ]
        metrics = metrics_of(rows, result, loss_fn)
        return ForwardBackwardOutput(outputs, metrics, "ArrayRecord")

    def optim_step(self, model_id: str, params: AdamParams) -> Dict[str, float]:
        """See `Engine` and `Adam.step`.  A missing gradient counts as zero."""
        run = self._run(model_id)
        check_values(params)
        return run.optimizer.step(params)

    def _run(self, model_id: str) -> _Run:
        run = self._runs.get(model_id)
        if run is None:
            raise EngineError(f"no model {model_id}; it was never created, or was unloaded")
        return run

    # --- checkpoints ---------------------------------------------------------------------------

    def save(self, model_id: str, folder: Path, *, with_optimizer: bool) -> None:
        run = self._run(model_id)
        folder.mkdir(parents=True, exist_ok=True)
        adapter_files.write_adapter(run.adapter, run.lora, folder)
        if with_optimizer:
            adapter_files.write_tensors(run.optimizer.tensors(), folder / OPTIMIZER_WEIGHTS)
            state = {"type": "adamw", "step": run.optimizer.step_count}
            (folder / OPTIMIZER_FILE).write_text(json.dumps(state) + "\n")

    def export(self, model_id: str, folder: Path) -> None:
        run = self._run(model_id)
        folder.mkdir(parents=True, exist_ok=True)
        adapter_files.write_adapter(run.adapter, run.lora, folder, for_export=True)

    def load(self, model_id: str, folder: Path, *, with_optimizer: bool) -> None:
        """See `Engine`.  Rank, alpha and adapted layers must match.

        A checkpoint with the same configuration but other layers, as chosen by an earlier version
        of tinkex or of one of its libraries, is loaded as it is.
        """
        run = self._run(model_id)
        adapter = run.adapter
        if adapter_files.has_other_layout(adapter, run.lora, folder):
            adapter = self._pool.add(adapter_files.read_config(folder))
        try:
            self._load(run, adapter, folder, with_optimizer=with_optimizer)
        except BaseException:
            if adapter is not run.adapter:
                self._pool.remove(adapter)
            raise
        if adapter is not run.adapter:
            run.adapter, replaced = adapter, run.adapter
            self._pool.remove(replaced)

    def _load(self, run: _Run, adapter: Adapter, folder: Path, *, with_optimizer: bool) -> None:
        """Fill *adapter* and the optimizer of *run* from *folder*; nothing changes if it fails."""
        # Read and check everything before changing the first value.
        weights = adapter_files.read_into(adapter, folder)
        optimizer = Adam(adapter.parameters)
        if with_optimizer:
            if not (folder / OPTIMIZER_FILE).is_file():
                raise EngineError(
                    f"{folder} was saved without optimizer state; use load_state, which needs none"
                )
            state = json.loads((folder / OPTIMIZER_FILE).read_text())
            tensors = adapter_files.read_tensors(folder, OPTIMIZER_WEIGHTS, optimizer.tensors())
            optimizer.restore(tensors, int(state["step"]))
        adapter_files.assign(adapter.parameters, weights)
        for parameter in adapter.parameters.values():
            parameter.grad = None
        run.optimizer = optimizer

    def lora_config(self, folder: Path) -> LoraConfig:
        return adapter_files.read_lora(folder, self._pool.targets)

    # --- sampling ------------------------------------------------------------------------------

    def create_sampler(self, sampler_id: str, folder: Optional[Path]) -> None:
        if sampler_id in self._samplers:
            raise EngineError(f"sampler {sampler_id} exists already")
        adapter: Optional[Adapter] = None
        if folder is not None:
            config = adapter_files.read_config(folder)
            adapter = self._pool.add(config, seed=0)  # overwritten below
            try:
                weights = adapter_files.read_into(adapter, folder)
            except BaseException:
                self._pool.remove(adapter)
                raise
            adapter_files.assign(adapter.parameters, weights)
            for parameter in adapter.parameters.values():
                parameter.requires_grad_(False)  # frozen, so that no pass keeps a graph for it
        self._samplers[sampler_id] = adapter

    def unload_sampler(self, sampler_id: str) -> None:
        adapter = self._samplers.pop(sampler_id, None)
        if adapter is not None:
            self._pool.remove(adapter)

    def sample(
        self,
        sampler_id: str,
        requests: Sequence[SampleRequest],
        dropped: Container[int] = (),
    ) -> Iterator[List[Finished]]:
        """See `Engine` and `SampleRun`."""
        if sampler_id not in self._samplers:
            raise EngineError(f"no sampler {sampler_id}; it was never created, or was unloaded")
        adapter = self._samplers[sampler_id]
        run = SampleRun(self._network, self._vocabulary, self._info, requests)
        while not run.done:
            # Between slices the sampler may be unloaded, and its id reused for another.
            if sampler_id not in self._samplers or self._samplers[sampler_id] is not adapter:
                yield run.abandon(
                    EngineError(f"sampler {sampler_id} was unloaded while it was sampling")
                )
                return
            self._pool.activate(adapter)  # other work may have run since the last slice
            run.drop(dropped)
            # Leave inference mode before each yield: it belongs to the thread, not to this
            # generator.
            with torch.inference_mode():
                finished = run.advance()
            yield finished

    def interrupt(self) -> None:
        """See `Engine`.  The call in progress fails after at most one more layer."""
        self._interruption.requested = True

    def close(self) -> None:
        self._runs.clear()
        self._samplers.clear()
        # Delete the attributes: if they became None, every method would have to check for that.
        for name in ("_network", "_pool"):
            self.__dict__.pop(name, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _context_length(config: Any, tokenizer: Any) -> int:
    length = getattr(config, "max_position_embeddings", None)
    if length is None:
        # BLOOM's positions have no limit.  Tokenizers without a limit report 1e30.
        length = min(tokenizer.model_max_length, _CONTEXT_IF_UNKNOWN)
    return int(length)


def _check_finite(result: BatchResult, gradients: List[torch.Tensor]) -> None:
    # One NaN in the optimizer's running averages would make every later step NaN.
    for index, losses in enumerate(result.losses):
        if not np.isfinite(losses).all():
            raise EngineError(
                f"datum {index}: the loss is not finite; its logprobs may belong to another model "
                "or other tokens, or the learning rate is too high"
            )
    if not np.isfinite(global_norm(gradients)):
        raise EngineError("the gradient is not finite; the learning rate may be too high")
