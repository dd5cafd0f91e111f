"""The settings of ``tinkex train``: its options, and what is derived from them and the files."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from tinkex import data
from tinkex._runtime.error_text import ErrorText, Setting
from tinkex.cli import status_line
from tinkex.cli.output import count
from tinkex.config import Config
from tinkex.errors import InvalidInputError
from tinkex.recipes.prepared import split_heldout
from tinkex.recipes.schedules import Schedule, constant, cosine, linear
from tinkex.runs.records import EMBEDDED

METHODS = ("supervised", "dpo")
SCHEDULES = ("constant", "linear", "cosine")

#: Without --heldout, one example in this many is held out, but not more than this many in total...
_HELDOUT_SHARE, _HELDOUT_MOST = 20, 200
#: ... and none of a file with fewer examples than this.
_HELDOUT_FROM = 40

_RATES = {"supervised": 2e-4, "dpo": 1e-5}
#: For supervised training on the embedded server: the narrower a model, the higher its best rate,
#: and models that are trained on one machine are narrow.  (After 24 steps of smollm2-135m on 190
#: chats, the held-out loss was 1.24 with a rate of 2e-4, and 0.28 with 1e-3.  But 1e-3 is too high
#: for wider models.)
_RATE_HERE = 5e-4


@dataclasses.dataclass
class Job:
    """The options of ``tinkex train``."""

    file: Path
    model: str
    out: Path
    method: Optional[str]
    learn: str
    rank: int
    learning_rate: Optional[float]
    schedule: str
    warmup: int
    batch_size: int
    accumulation: int
    epochs: Optional[float]
    steps: Optional[int]
    max_tokens: Optional[int]
    heldout: Optional[str]
    eval_every: Optional[int]
    save_every: Optional[int]
    beta: float
    seed: int
    loggers: Tuple[str, ...]
    skip_bad: bool
    base_url: Optional[str]
    accept_changes: bool

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs", "beta"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise InvalidInputError(ErrorText(Setting(name, value), " is not a finite number"))
        if self.epochs is not None and self.steps is not None:
            both = ErrorText(Setting("epochs"), " and ", Setting("steps"), " were both given")
            raise InvalidInputError(both, hint="Give one of them.")
        if self.accumulation > self.batch_size:
            raise InvalidInputError(
                ErrorText(
                    Setting("accumulation", self.accumulation),
                    " is more than ",
                    Setting("batch_size", self.batch_size),
                )
            )
        self.base_url = self.base_url or os.environ.get("TINKER_BASE_URL") or None
        if self.base_url is None and (Path(self.model) / "config.json").is_file():
            self.model = str(Path(self.model).resolve())  # `tinkex chat` may run elsewhere


class JobExamples:
    """The examples of a job, read but not prepared.

    Attributes:
        method: ``"supervised"`` or ``"dpo"``.
        config: the run's settings that determine what is learnt, and on which server.
    """

    def __init__(self, job: Job) -> None:
        status_line.waiting_for(f"reading {job.file}")
        self.training = data.open_examples(job.file, skip_bad=job.skip_bad)
        self.method = _method(job, self.training)
        self.heldout = self.training
        self.indices: Any = None  # all
        self.heldout_indices: Any = None
        share = _share(job.heldout)
        if job.heldout is not None and share is None:
            self.heldout = data.open_examples(job.heldout, skip_bad=job.skip_bad)
            _method(dataclasses.replace(job, method=self.method), self.heldout)
            held = _describe(self.heldout)
        else:
            size = _heldout_size(len(self.training), share)
            self.indices, self.heldout_indices = split_heldout(len(self.training), size, job.seed)
            held = f"{count(size, 'example')} of the file"
        self.config: Dict[str, Any] = {
            "server": EMBEDDED
            if job.base_url is None
            else Config.resolve(base_url=job.base_url).base_url,
            "method": self.method,
            "data": _describe(self.training),
            "heldout": held,
            "learning_rate": job.learning_rate or _default_rate(job, self.method),
            "schedule": job.schedule,
            "warmup": job.warmup,
            "batch_size": job.batch_size,
            "accumulation": job.accumulation,
            "max_tokens": job.max_tokens,
            **({"epochs": job.epochs or 1.0} if job.steps is None else {"steps": job.steps}),
            **({"beta": job.beta} if self.method == "dpo" else {"learn": job.learn}),
        }


def _method(job: Job, examples: data.Examples) -> str:
    """Return the method for *examples*; InvalidInputError if ``--method`` is another one."""
    preferences = data.Preference in examples.kinds
    if preferences and len(examples.kinds) > 1:
        raise InvalidInputError(f"{examples.path} has both preferences and other examples")
    found = "dpo" if preferences else "supervised"
    if job.method not in (None, found):
        raise InvalidInputError(
            f"{examples.path} has {'' if preferences else 'no '}preferences",
            hint="--method dpo needs a file of preferences (prompt, chosen, rejected); other "
            "examples are for --method supervised.",
        )
    return found


def _share(heldout: Optional[str]) -> Optional[float]:
    """Return the value of --heldout if it is a share; None if it is a file, or not given."""
    try:
        share = float(heldout or "")
    except ValueError:
        return None
    if not 0 <= share < 1:
        raise InvalidInputError(
            f"--heldout is {heldout}; a share must be at least 0 and less than 1"
        )
    return share


def _heldout_size(examples: int, share: Optional[float]) -> int:
    if share is not None:
        return min(round(examples * share), examples - 1)
    return min(examples // _HELDOUT_SHARE, _HELDOUT_MOST) if examples >= _HELDOUT_FROM else 0


def _describe(examples: data.Examples) -> str:
    return f"{count(len(examples), 'example')}, sha256 {examples.fingerprint[:16]}"


def _default_rate(job: Job, method: str) -> float:
    here = job.base_url is None and method == "supervised"
    return _RATE_HERE if here else _RATES[method]


def schedule_of(config: Dict[str, Any], steps: int) -> Schedule:
    rate, warmup = config["learning_rate"], config["warmup"]
    if config["schedule"] == "constant":
        return constant(rate, warmup=warmup)
    make = linear if config["schedule"] == "linear" else cosine
    return make(rate, steps, warmup=warmup)
