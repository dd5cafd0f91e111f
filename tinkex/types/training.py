"""Parameters, results and control messages of training calls.

See docs/protocol.md, "Training runs" and "Submissions".
"""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, List, Optional

from tinkex._runtime.numeric import convert_fields, is_int, to_bool
from tinkex.errors import InvalidInputError
from tinkex.types._wire import Wire, bulk, json_number_map
from tinkex.types.checkpoint_path import checkpoint_url, playground_url
from tinkex.types.tensor_data import TensorData

#: The outputs of a loss for one datum, by name.
LossFnOutput = Dict[str, TensorData]

_LAYERS = ("train_mlp", "train_attn", "train_unembed")


@dataclasses.dataclass(frozen=True)
class LoraConfig(Wire):
    """The LoRA adapter to train: its rank, at least 1, its seed, and the layers it adapts.

    numpy values, and strings such as ``"8"`` and ``"false"``, are converted.
    """

    rank: int = 32
    seed: Optional[int] = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    def __post_init__(self) -> None:
        convert_fields(self, ints=("rank", "seed"))
        for name in _LAYERS:
            object.__setattr__(self, name, to_bool(getattr(self, name)))

    def check(self) -> None:
        """Raise InvalidInputError if the adapter would be empty, or a value is out of range."""
        if not is_int(self.rank, 1):
            raise InvalidInputError(
                f"LoRA rank is {self.rank!r}; it must be an integer, at least 1"
            )
        if self.seed is not None and not is_int(self.seed):
            raise InvalidInputError(f"seed is {self.seed!r}; it must be an integer")
        for name in _LAYERS:
            if not isinstance(getattr(self, name), bool):
                raise InvalidInputError(
                    f"{name} is {getattr(self, name)!r}; it must be True or False"
                )
        if not (self.train_unembed or self.train_mlp or self.train_attn):
            raise InvalidInputError(
                "nothing to train: train_mlp, train_attn and train_unembed are all False"
            )


@dataclasses.dataclass(frozen=True)
class ForwardBackwardOutput:
    """The result of one pass over a batch.

    Attributes:
        loss_fn_outputs: one map per datum, in input order.  ``["logprobs"]`` is float32, with the
            shape of the datum's ``target_tokens``.
        metrics: metrics by name, with the reduction after a colon: ``"loss:sum"``.  A custom loss
            may also return values that are not numbers; they are unchanged.
        loss_fn_output_type: the server's name for the kind of output.
    """

    loss_fn_outputs: List[Dict[str, TensorData]]
    metrics: Dict[str, float]
    loss_fn_output_type: str = ""


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
    """An optimizer step was done; ``metrics`` is empty if the server reports none."""

    metrics: Dict[str, float] = bulk({}, read=json_number_map)


@dataclasses.dataclass(frozen=True)
class SaveWeightsResponse(Wire):
    """A training checkpoint was saved at ``path`` (a ``tinker://`` URI)."""

    path: str

    def get_console_url(self) -> str:
        """Return the URL of the checkpoint's page in the hosted service's console."""
        return checkpoint_url(self.path)


@dataclasses.dataclass(frozen=True)
class SaveWeightsForSamplerResponse(Wire):
    """Weights were saved for sampling: under a ``path``, or for the session alone as a sampler.

    Only one field is set: ``path``, or ``sampling_session_id``, the id of that sampler.
    """

    path: Optional[str] = None
    sampling_session_id: Optional[str] = None

    def get_console_url(self) -> str:
        """Return the URL of the checkpoint's console page; only for a checkpoint with a path."""
        return checkpoint_url(self.path or "")

    def get_playground_url(self) -> str:
        """Return the URL of the page to sample from it; only for a checkpoint with a path."""
        return playground_url(self.path or "")


@dataclasses.dataclass(frozen=True)
class SaveWeightsExternalResponse(Wire):
    """Weights were saved for download at ``path``; ``size_bytes`` is None if not reported."""

    path: str
    size_bytes: Optional[int] = None


@dataclasses.dataclass(frozen=True)
class UnloadModelResponse(Wire):
    """A run was unloaded."""

    model_id: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class CreateCustomLossResponse(Wire):
    """A custom loss was uploaded."""

    loss_id: str


@dataclasses.dataclass(frozen=True)
class ModelData(Wire):
    """A base model, as the server describes it."""

    arch: Optional[str] = None
    model_name: Optional[str] = None
    tokenizer_id: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class GetInfoResponse(Wire):
    """A training run, as the server describes it.

    Attributes:
        adapted_modules: how many layers the adapter changes, by the layers' name with ``*`` in
            place of indices.  None if the server does not report it.
    """

    model_id: str
    model_data: ModelData = dataclasses.field(default_factory=ModelData)
    is_lora: Optional[bool] = None
    lora_rank: Optional[int] = None
    model_name: Optional[str] = None
    optimizer_config: Optional[Dict[str, Any]] = bulk(None)
    adapted_modules: Optional[Dict[str, int]] = bulk(None)
