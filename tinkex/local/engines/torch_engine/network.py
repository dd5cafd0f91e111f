"""A causal language model in two halves: tokens -> features, and features -> logits.

Logits are by far the largest tensor of a pass (49,152 floats per token for SmolLM2), so callers
ask for them in chunks, and only where they need them.
"""

from __future__ import annotations

import inspect
from typing import Any, Callable, Dict, List, Optional, Sequence, Set

import torch

from tinkex.local.engines.engine import EngineError
from tinkex.local.engines.torch_engine.rope import RopeLengths

#: Rows of logits worked on at a time: 256 x 49,152 floats are 50 MB.
LOGITS_ROWS = 256

#: Tokens (with padding) of one pass: bounds the activations kept for the backward pass (SmolLM2:
#: about 2 MB per token).
TOKENS_PER_PASS = 2048

# A row shorter than _LIKE_LENGTH times a pass's longest row begins another pass, to save padding;
# but not before the pass has _WORTH_A_PASS tokens, as a tiny pass costs more in calls than padding
# does.
_LIKE_LENGTH = 0.8
_WORTH_A_PASS = 512


class Interruption:
    """Lets another thread stop a computation: each layer checks it, in the backward pass too.

    At exit, Python unwinds daemon threads, and torch's C++ code then calls abort().  So a pass,
    which may take minutes, must end before that, and it can end between two layers.
    """

    def __init__(self) -> None:
        # Set once, by any thread, and read by the engine's thread.  No lock: assigning a bool is
        # atomic, and if one layer's check misses it, the next one's will not.
        self.requested = False

    def check(self) -> None:
        """Raise EngineError if an interruption was requested."""
        if self.requested:
            raise EngineError("the engine was interrupted, because the server is closing", "server")

    def watch(self, model: Any) -> None:
        """Check after each layer of *model*, and when a gradient comes back to the layer."""
        # Decoders keep their layers in a ModuleList, and one layer's work is short enough to wait
        # for.
        for module in model.modules():
            if isinstance(module, torch.nn.ModuleList):
                for layer in module:
                    layer.register_forward_hook(self._after_layer)

    def _after_layer(self, layer: Any, arguments: Any, output: Any) -> None:
        self.check()
        features = output[0] if isinstance(output, tuple) else output
        if isinstance(features, torch.Tensor) and features.requires_grad:
            # A hook that raises ends backward().  One that returns None keeps the gradient.
            features.register_hook(lambda gradient: self.check())


class Network:
    """A transformers model, split after its decoder.

    After the decoder comes the output layer, and in some architectures something more (soft capping
    in Gemma 2, scaling in Cohere).  If a model cannot be split, its "features" are its logits:
    everything works, but takes more memory.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        text_config = model.config.get_text_config(decoder=True)
        self.vocab_size = int(text_config.vocab_size)
        self.device: torch.device = next(model.parameters()).device
        self.interruption = Interruption()
        self.interruption.watch(model)
        # If positions have no table (BLOOM), 2: the shortest length that RopeLengths tries.
        self.rope = RopeLengths(model, getattr(text_config, "max_position_embeddings", None) or 2)
        self._decoder = _decoder_of(model)
        self._output_type: Any = None
        with torch.no_grad():
            self._head: Optional[Callable[[torch.Tensor], torch.Tensor]] = self._find_head()
        parameters = _parameters(self._decoder, model) if self.is_split else _parameters(model)
        # Chosen by the signature: transformers 5.24 calls it "cache", earlier releases (and custom
        # models) "past_key_values", which warns from 5.24 on and is gone from 5.40 on.
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self._takes_positions = "position_ids" in parameters

    @property
    def is_split(self) -> bool:
        """Whether features are the decoder's output (else they are logits)."""
        return self._head is not None

    def _find_head(self) -> Optional[Callable[[torch.Tensor], torch.Tensor]]:
        """Return the function that turns the decoder's output into logits, if trying finds one."""
        if self._decoder is self.model:
            return None
        probe = torch.tensor([[0, 1, 2]], device=self.device)
        output = self._decoder(input_ids=probe, use_cache=False)
        features = getattr(output, "last_hidden_state", None)
        if features is None:
            return None
        self._output_type = type(output)
        expected = self.model(input_ids=probe, use_cache=False).logits
        # The output layer comes first: if it is all there is, calling it is cheaper than running
        # the model's forward around it.  Compared bit for bit, because the right head runs the same
        # operations on the same numbers.
        heads = [self._after_decoder]
        if self.model.get_output_embeddings() is not None:
            heads.insert(0, self._output_layer)
        for head in heads:
            if torch.equal(head(features), expected):
                return head
        return None

    def _output_layer(self, features: torch.Tensor) -> torch.Tensor:
        # Looked up at each call, since an adapter may wrap it.
        logits: torch.Tensor = self.model.get_output_embeddings()(features)
        return logits

    def _after_decoder(self, features: torch.Tensor) -> torch.Tensor:
        """Run the model's own code with *features* in place of its decoder's output."""
        # Models take (b, t, d): whatever the leading shape, its tokens become one row.
        rows = features.reshape(1, -1, features.shape[-1])
        output = self._output_type(last_hidden_state=rows)
        # Only the tokens' shape matters: the decoder that would read them is replaced during this
        # call.  No other thread can see that, since an engine runs on one thread.
        tokens = torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)
        own_forward = self._decoder.forward
        self._decoder.forward = lambda *args, **kwargs: output
        try:
            logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits
        finally:
            self._decoder.forward = own_forward
        return logits.reshape(*features.shape[:-1], logits.shape[-1])

    def features(
        self,
        tokens: torch.Tensor,
        *,
        lengths: Sequence[int],
        cache: Optional[Any] = None,
        positions: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Run int64 *tokens* of shape (b, t); return (b, t, d).

        *lengths* are the full lengths, without padding, of the b sequences that the rows belong to.
        *cache* is a transformers ``Cache``, which this call reads and extends.  *positions*, of
        shape (b, t), are 0 to t - 1 by default; they are ignored if the architecture takes none.
        """
        arguments: Dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            arguments[self._cache_argument] = cache
        if attention_mask is not None:
            arguments["attention_mask"] = attention_mask
        if positions is not None and self._takes_positions:
            arguments["position_ids"] = positions
        with self.rope.rows(lengths):
            if self.is_split:
                output = self._decoder(input_ids=tokens, **arguments)
                features: torch.Tensor = output.last_hidden_state
                return features
            logits: torch.Tensor = self.model(input_ids=tokens, **arguments).logits
            return logits

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return float32 logits (..., vocabulary) of *features* (..., d)."""
        self.interruption.check()
        if self._head is not None:
            features = self._head(features)
        # Even for a bfloat16 model: log-probabilities near 0 and sums of exponentials over the
        # vocabulary need more than its 8 bits.
        return features.float()


def _decoder_of(model: Any) -> Any:
    """Return the part of *model* before its output layer; *model* itself if there is none."""
    # base_model is the model itself if its decoder is not stored under base_model_prefix.
    candidates = [model.base_model, getattr(model, "model", None)]
    return next((part for part in candidates if part is not None and part is not model), model)


def _parameters(*modules: Any) -> Set[str]:
    """Return the names of the arguments that the first module's forward takes.

    If it takes and passes on any others (``**kwargs``), the next module's count as well.
    """
    names: Set[str] = set()
    for module in modules:
        parameters = inspect.signature(module.forward).parameters
        names.update(parameters)
        if not any(kind.kind is inspect.Parameter.VAR_KEYWORD for kind in parameters.values()):
            break
    return names


def plan_passes(lengths: Sequence[int], budget: int = TOKENS_PER_PASS) -> List[List[int]]:
    """Group the indices of *lengths* into passes, longest first.

    A pass holds rows of similar length, and at most *budget* tokens with padding (a row longer than
    that has a pass to itself).  The plan depends only on the lengths.
    """
    # Longest first, so that the first row of a pass gives its width.
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    passes: List[List[int]] = []
    current: List[int] = []
    for index in order:
        longest = lengths[current[0]] if current else 0
        full = (len(current) + 1) * longest > budget
        unlike = lengths[index] < _LIKE_LENGTH * longest and len(current) * longest >= _WORTH_A_PASS
        if current and (full or unlike):
            passes.append(current)
            current = []
        current.append(index)
    if current:
        passes.append(current)
    return passes
