"""Optimizers: the fields sent for a run and for a step, and refused parameters."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any

import numpy as np
import pytest

from tinkex.errors import InvalidInputError
from tinkex.types import (
    AdamOptimizerConfig,
    AdamParams,
    DimuonOptimizerConfig,
    DimuonParams,
    LoraConfig,
)
from tinkex.types.optimizer import optim_params_to_wire, optimizer_config_to_wire


@dataclasses.dataclass
class Lion:
    rate: float
    type: str = "lion"


class Pydantic:
    type = "lion"

    def model_dump(self) -> Any:
        return {"type": self.type, "rate": 0.5}


@pytest.mark.parametrize("config", [None, AdamOptimizerConfig(), {"type": "adamw"}], ids=repr)
def test_the_default_optimizer_is_not_sent(config):
    assert optimizer_config_to_wire(config) is None


@pytest.mark.parametrize(
    ("config", "sent"),
    [
        (DimuonOptimizerConfig(), {"type": "dimuon", "version": 1}),
        ({"type": "adamw", "amsgrad": True}, {"type": "adamw", "amsgrad": True}),
        ({"type": "lion", "rate": np.float32(0.5)}, {"type": "lion", "rate": 0.5}),
        ({"type": "lion", "deep": {"x": [1, None]}}, {"type": "lion", "deep": {"x": [1, None]}}),
        (Lion(0.5), {"type": "lion", "rate": 0.5}),
        (Pydantic(), {"type": "lion", "rate": 0.5}),
        (types.SimpleNamespace(type="lion", rate=np.int64(2)), {"type": "lion", "rate": 2}),
    ],
    ids=repr,
)
def test_any_other_family_passes_through(config, sent):
    assert optimizer_config_to_wire(config) == sent
    assert optim_params_to_wire(config) == {"optimizer_params": sent}


def test_adam_has_a_field_of_its_own_and_dimuon_does_not():
    assert set(optim_params_to_wire(AdamParams())) == {"adam_params"}
    assert optim_params_to_wire(DimuonParams(0.02, beta1=0.5)) == {
        "optimizer_params": {
            "type": "dimuon",
            "learning_rate": 0.02,
            "grad_clip_norm": 0.0,
            "beta1": 0.5,
        }
    }


@pytest.mark.parametrize(
    ("params", "what"),
    [
        (DimuonParams(math.nan), "DimuonParams.learning_rate"),
        (DimuonParams(-1.0), "DimuonParams.learning_rate"),
        (DimuonParams(1.0, grad_clip_norm=math.inf), "DimuonParams.grad_clip_norm"),
        (DimuonParams(1.0, beta1=1.0), "DimuonParams.beta1"),
        (AdamParams(learning_rate=math.inf), "AdamParams.learning_rate"),
        ({"type": "lion", "rate": math.nan}, "rate"),
        ({"type": "lion", "deep": [{"x": -math.inf}]}, r"\['deep'\]\[0\]\['x'\]"),
        ({"type": "lion", "rate": b"x"}, "bytes"),
        ({"learning_rate": 0.1}, "no type"),
        ({"type": 7}, "no type"),
        (None, "is None; it must be an object that describes an optimizer"),
        (0.1, "is 0.1; it must be an object that describes an optimizer"),
        (AdamParams, "AdamParams'>; it must be an object that describes an optimizer"),
        (LoraConfig(), "no type"),
    ],
    ids=repr,
)
def test_invalid_optimizer_parameters_are_refused(params, what):
    with pytest.raises(InvalidInputError, match=what):
        optim_params_to_wire(params)


def test_later_changes_to_the_callers_dict_have_no_effect():
    params = {"type": "lion", "deep": {"x": 1}}
    sent = optim_params_to_wire(params)
    params["deep"]["x"] = 2
    assert sent == {"optimizer_params": {"type": "lion", "deep": {"x": 1}}}
