"""Training calls: their parameters, results and control messages (reference, section 1.5.2)."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any, Dict, List, Optional

from tinkex.errors import InvalidInputError
from tinkex.types._wire import Wire, bulk
from tinkex.types.tensor_data import TensorData


@dataclasses.dataclass(frozen=True)
class LoraConfig(Wire):
    """Which LoRA adapter to train: its rank, and on which layers."""

    rank: int = 32
    seed: Optional[int] = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    def check(self) -> None:
        """Raise InvalidInputError if the adapter would be empty or its rank impossible."""
        if type(self.rank) is not int or self.rank < 1:
            raise InvalidInputError(f"LoRA rank is {self.rank!r}; it must be at least 1")
        if not (self.train_unembed or self.train_mlp or self.train_attn):
            raise InvalidInputError(
                "nothing to train: train_mlp, train_attn and train_unembed are all False"
            )


@dataclasses.dataclass(frozen=True)
class AdamParams(Wire):
    """One Adam step.

    Args:
        learning_rate: step size.
        beta1, beta2: decay of the running mean and square of the gradient, in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled decay (AdamW), per step times learning rate.
        grad_clip_norm: rescale the gradient to this global norm if it is larger; 0 is off.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def check(self) -> None:
        """Raise InvalidInputError if a value is NaN, infinite or out of its range."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # Real, so that numpy's own floats are taken too.
            if not (isinstance(value, numbers.Real) and 0 <= float(value) < math.inf):
                raise InvalidInputError(
                    f"AdamParams.{field.name} is {value!r}; it must be a finite number, 0 or more"
                )
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise InvalidInputError(
                    f"AdamParams.{name} is {getattr(self, name)}; it must be < 1"
                )


@dataclasses.dataclass(frozen=True)
class ForwardBackwardOutput:
    """The result of one pass over a batch.

    Attributes:
        loss_fn_outputs: one map per datum, in input order.  ``["logprobs"]`` is float32 of the
            shape of the datum's ``target_tokens``.
        metrics: named sums and means, the reduction after a colon: ``"loss:sum"``.
        loss_fn_output_type: the server's name for what a map holds.
    """

    loss_fn_outputs: List[Dict[str, TensorData]]
    metrics: Dict[str, float]
    loss_fn_output_type: str = ""


@dataclasses.dataclass(frozen=True)
class UntypedFuture(Wire):
    """The answer to a submission: poll ``request_id`` for the result."""

    request_id: str
    model_id: Optional[str] = None
    sample_sequence_ids: Optional[List[str]] = bulk(None)


@dataclasses.dataclass(frozen=True)
class CreateModelResponse(Wire):
    """A training run was created."""

    model_id: str


@dataclasses.dataclass(frozen=True)
class LoadWeightsResponse(Wire):
    """Weights were loaded."""

    path: Optional[str] = None
    model_id: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class OptimStepResponse(Wire):
    """An optimizer step was taken; ``metrics`` is empty on servers that report none."""

    metrics: Optional[Dict[str, float]] = bulk(None)


@dataclasses.dataclass(frozen=True)
class SaveWeightsResponse(Wire):
    """A training checkpoint was saved at ``path`` (a ``tinker://`` URI)."""

    path: str


@dataclasses.dataclass(frozen=True)
class SaveWeightsForSamplerResponse(Wire):
    """Sampler weights were saved: named ones at ``path``, ephemeral ones behind a session id."""

    path: Optional[str] = None
    sampling_session_id: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class ModelData(Wire):
    """What the server says of a base model."""

    arch: Optional[str] = None
    model_name: Optional[str] = None
    tokenizer_id: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class GetInfoResponse(Wire):
    """What the server says of a training run."""

    model_id: str
    model_data: ModelData = dataclasses.field(default_factory=ModelData)
    is_lora: Optional[bool] = None
    lora_rank: Optional[int] = None
    model_name: Optional[str] = None
    optimizer_config: Optional[Dict[str, Any]] = bulk(None)
