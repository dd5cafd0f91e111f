"""The causal language model as two halves: tokens -> features, and features -> logits.

Logits are by far the largest tensor of a pass (49,152 floats per token for SmolLM2), so callers
ask for them in chunks, and only where they need them.
"""

from __future__ import annotations

import inspect
from typing import Any, List, Optional, Tuple

import torch

from tinkex.errors import LocalServerError
from tinkex.local.engine import EngineError
from tinkex.local.torch_engine.quiet import quiet

#: Rows of logits worked on at a time: 256 x 49,152 floats are 50 MB.
LOGITS_ROWS = 256


class Interruption:
    """Stops a computation from another thread: each layer looks here, on the way back too."""

    def __init__(self) -> None:
        self.requested = False  # written by any thread, once; read by the engine's

    def check(self) -> None:
        """Raise EngineError once it is requested."""
        if self.requested:
            raise EngineError("the engine was interrupted, since the server is closing", "server")

    def watch(self, model: Any) -> None:
        """Look after each layer of *model*, and when a gradient comes back to it."""
        for module in model.modules():
            if isinstance(module, torch.nn.ModuleList):
                for layer in module:
                    layer.register_forward_hook(self._after_layer)

    def _after_layer(self, layer: Any, arguments: Any, output: Any) -> None:
        self.check()
        features = output[0] if isinstance(output, tuple) else output
        if isinstance(features, torch.Tensor) and features.requires_grad:
            features.register_hook(self._on_gradient)

    def _on_gradient(self, gradient: torch.Tensor) -> None:
        self.check()


class Network:
    """A transformers model, split before its output layer where the architecture allows.

    Some architectures change the logits after the output layer (soft capping, scaling); whether
    this one does is found out by trying.  Then "features" are the logits themselves: everything
    works, with more memory.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        text_config = model.config.get_text_config()
        self.vocab_size = int(text_config.vocab_size)
        self.layer_count = int(text_config.num_hidden_layers)
        self.device: torch.device = next(model.parameters()).device
        self._decoder = model.base_model
        self.interruption = Interruption()
        self.interruption.watch(model)
        with torch.no_grad():
            self.is_split = self._try_split()
        # Chosen by the signature: transformers 5.24 calls it "cache", earlier releases (and custom
        # models) "past_key_values", which warns from 5.24 on and is gone from 5.40 on.
        self._cache_argument = _cache_argument(self._decoder if self.is_split else model)

    def _try_split(self) -> bool:
        head = self.model.get_output_embeddings()
        if head is None or self._decoder is self.model:
            return False
        probe = torch.tensor([[0, 1, 2]], device=self.device)
        output = self._decoder(input_ids=probe, use_cache=False)
        features = getattr(output, "last_hidden_state", None)
        if features is None:
            return False
        whole = self.model(input_ids=probe, use_cache=False).logits
        return bool(torch.equal(head(features), whole))

    def features(
        self, tokens: torch.Tensor, *, cache: Optional[Any] = None, **arguments: Any
    ) -> torch.Tensor:
        """Run int64 *tokens* of shape (b, t); return (b, t, d).

        *cache* is a transformers ``Cache``, which this call reads and extends.  The other
        arguments are those of the model's ``forward``.
        """
        arguments["use_cache"] = cache is not None
        if cache is not None:
            arguments[self._cache_argument] = cache
        if self.is_split:
            output: torch.Tensor = self._decoder(input_ids=tokens, **arguments).last_hidden_state
            return output
        logits: torch.Tensor = self.model(input_ids=tokens, **arguments).logits
        return logits

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return float32 logits (..., vocabulary) of *features* (..., d)."""
        self.interruption.check()
        if self.is_split:
            features = self.model.get_output_embeddings()(features)
        return features.float()


def _cache_argument(model: Any) -> str:
    """Return the name under which *model*'s forward takes its key-value cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class _TargetLogprobs(torch.autograd.Function):  # type: ignore[misc]  # torch is Any to mypy
    """log_softmax + gather that keeps one buffer of logits' size and turns it into the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logprobs = torch.log_softmax(logits, dim=-1)
        ctx.logprobs, ctx.targets = logprobs, targets
        return logprobs.gather(-1, targets)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Tuple[torch.Tensor, None]:
        # d lp_k / d logits = onehot(target_k) - softmax, summed over the k targets of a row.
        (grad,) = grads
        gradient = ctx.logprobs.exp_().mul_(-grad.sum(-1, keepdim=True))
        gradient.scatter_add_(-1, ctx.targets, grad)
        ctx.logprobs = ctx.targets = None
        return gradient, None


def target_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities (n, k) of int64 *targets* (n, k) under *logits* (n, v).

    Differentiable once: the backward pass uses up the buffer it keeps.
    """
    if not torch.is_grad_enabled():
        return logits.gather(-1, targets) - torch.logsumexp(logits, -1, keepdim=True)
    result: torch.Tensor = _TargetLogprobs.apply(logits, targets)
    return result


def load_network(source: str, device: str, dtype: Any, what: str) -> Tuple[Network, Any]:
    """Load model and tokenizer of *source* (a folder or a Hugging Face name).

    Returns the network, frozen and in evaluation mode, and the tokenizer.

    Raises:
        LocalServerError: it cannot be had, is no causal language model, or needs a cache this
            engine does not have (state-space and other recurrent layers).
    """
    with quiet():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise LocalServerError(
                f"cannot load the model {what}: {_first_lines(error)}",
                hint="Give a folder written by save_pretrained, a Hugging Face name this machine "
                "can reach, or smollm2-135m, which needs no model hub.",
            ) from error
        if getattr(model, "_is_stateful", False):
            raise LocalServerError(
                f"{what} ({type(model).__name__}) keeps a recurrent state, "
                "which this engine does not support",
                hint="Take a model with attention layers only.",
            )
        try:
            model = model.to(device).eval().requires_grad_(False)
        except (RuntimeError, AssertionError) as error:
            raise LocalServerError(
                f"cannot put {what} on device {device!r}: {_first_lines(error)}",
                hint='Use device="cpu".',
            ) from error
        return Network(model), tokenizer


def _first_lines(error: BaseException) -> str:
    lines: List[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
