"""Optimizers of runs, and their parameters (docs/protocol.md, "Optimizer steps")."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Dict, Mapping, Optional, Union, cast

from tinkex._runtime.numeric import convert_fields, is_finite, to_float
from tinkex.errors import InvalidInputError, a_type
from tinkex.types._wire import Wire, excerpt

#: The optimizer of a run created without naming one, on every server.
_DEFAULT_CONFIG = {"type": "adamw"}

#: The numeric parameters of each kind of step.
_ADAM = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")
_DIMUON = ("learning_rate", "grad_clip_norm", "beta1")


@dataclasses.dataclass(frozen=True)
class AdamOptimizerConfig(Wire):
    """Trains a run with AdamW, which is the default."""

    type: str = "adamw"


@dataclasses.dataclass(frozen=True)
class DimuonOptimizerConfig(Wire):
    """Trains a run with DiMuon, if the server supports it."""

    type: str = "dimuon"
    version: int = 1


#: A mapping, or an object with a ``type``, describes an optimizer that only the server knows.
OptimizerConfig = Union[AdamOptimizerConfig, DimuonOptimizerConfig, Mapping[str, Any], Any]


@dataclasses.dataclass(frozen=True)
class AdamParams(Wire):
    """The parameters of one Adam step.

    Args:
        learning_rate: the step size.
        beta1, beta2: decay of the running mean and square of the gradient, in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled weight decay (AdamW), multiplied by the learning rate.
        grad_clip_norm: scale a gradient with a larger global norm down to this norm; 0 disables it.

    numpy numbers, and strings such as ``"1e-4"``, are converted.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def __post_init__(self) -> None:
        convert_fields(self, floats=_ADAM)

    def check(self) -> None:
        """Raise InvalidInputError if a value is NaN, infinite or out of range."""
        _check_range(self, _ADAM, ("beta1", "beta2"))

    def to_wire(self) -> Dict[str, Any]:
        """Return the JSON form; fields that older servers do not know only if they are set."""
        encoded = super().to_wire()
        for name in ("weight_decay", "grad_clip_norm"):
            if encoded[name] == 0:
                del encoded[name]
        return encoded


@dataclasses.dataclass(frozen=True)
class DimuonParams(Wire):
    """The parameters of one DiMuon step, for a run created with `DimuonOptimizerConfig`.

    Args:
        learning_rate: the step size.
        grad_clip_norm: scale a gradient with a larger global norm down to this norm; 0 disables it.
        beta1: momentum, in [0, 1).
    """

    learning_rate: float
    grad_clip_norm: float = 0.0
    beta1: float = 0.9
    type: str = "dimuon"

    def __post_init__(self) -> None:
        convert_fields(self, floats=_DIMUON)

    def check(self) -> None:
        """Raise InvalidInputError if a value is NaN, infinite or out of range."""
        _check_range(self, _DIMUON, ("beta1",))


#: What `TrainingClient.optim_step` takes; mappings and objects as for `OptimizerConfig`.
OptimParams = Union[AdamParams, DimuonParams, Mapping[str, Any], Any]


def optimizer_config_to_wire(config: Optional[OptimizerConfig]) -> Optional[Dict[str, Any]]:
    """Return the JSON form of *config*, or None if it is the default, which is not sent.

    Raises:
        InvalidInputError: *config* has no ``type``, or holds values that JSON cannot express.
    """
    if config is None:
        return None
    encoded = _as_object("optimizer", config)
    return None if encoded == _DEFAULT_CONFIG else encoded


def optim_params_to_wire(params: OptimParams) -> Dict[str, Any]:
    """Return the field of an ``optim_step`` body that carries *params*, as a dict of one entry.

    Raises:
        InvalidInputError: a value is out of range, or *params* are of an unknown kind.
    """
    if isinstance(params, AdamParams):
        params.check()
        return {"adam_params": params.to_wire()}
    if isinstance(params, DimuonParams):
        params.check()
    return {"optimizer_params": _as_object("optim_params", params)}


def _check_range(params: Wire, names: Any, below_one: Any) -> None:
    for name in names:
        value = getattr(params, name)
        if not (is_finite(value) and value >= 0):
            raise InvalidInputError(
                f"{type(params).__name__}.{name} is {value!r}; "
                "it must be a finite number, 0 or more"
            )
        if name in below_one and value >= 1:
            raise InvalidInputError(f"{type(params).__name__}.{name} is {value}; it must be < 1")


_OBJECTS = (
    "Give AdamParams(learning_rate=1e-4), DimuonParams, AdamOptimizerConfig or "
    'DimuonOptimizerConfig, or a dict like {"type": "dimuon", "learning_rate": 0.01}.'
)


def _as_object(what: str, value: Any) -> Dict[str, Any]:
    """Return *value*, a mapping or an object with a ``type``, as a JSON object."""
    if isinstance(value, Mapping):
        encoded = dict(value)
    elif isinstance(value, Wire):
        encoded = value.to_wire()
    elif isinstance(value, type) or not hasattr(value, "__dict__"):
        # A class has the methods of its instances, but not their values.
        raise InvalidInputError(
            f"{what} is {excerpt(value, 100)}; it must be an object that describes an optimizer",
            hint=_OBJECTS,
        )
    elif dataclasses.is_dataclass(value):
        encoded = dataclasses.asdict(cast(Any, value))
    elif callable(getattr(value, "model_dump", None)):  # pydantic
        encoded = dict(value.model_dump())
    else:
        encoded = dict(vars(value))
    encoded.setdefault("type", getattr(value, "type", None))
    if not isinstance(encoded["type"], str) or not encoded["type"]:
        raise InvalidInputError(
            f"{what} is {excerpt(value, 100)}; it has no type",
            hint=_OBJECTS,
        )
    return {name: _plain(f"{what}[{name!r}]", item) for name, item in encoded.items()}


def _plain(what: str, value: Any) -> Any:
    """Return *value* as plain JSON data; raise InvalidInputError, naming *what*, if impossible."""
    value = to_float(value, text=False)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidInputError(f"{what} is {value}; it must be a finite number")
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(f"{what}[{name!r}]", item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(f"{what}[{index}]", item) for index, item in enumerate(value)]
    raise InvalidInputError(f"{what} is {a_type(value)}, which JSON cannot express")
