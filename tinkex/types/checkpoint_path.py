"""The ``tinker://`` paths of checkpoints (docs/protocol.md, "Paths"), and their console pages."""

from __future__ import annotations

import dataclasses
from urllib.parse import quote

from tinkex.errors import InvalidInputError

SCHEME = "tinker://"

#: The hosted service's web console.
CONSOLE = "https://tinker.thinkingmachines.ai"

#: Path segment -> checkpoint type.
KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}


def check_tinker_path(path: object) -> str:
    """Return *path*, a ``tinker://`` path, without surrounding whitespace.

    A path read from a file or the environment often ends with a line break.  What follows
    ``tinker://`` is not checked, because it depends on the server.

    Raises:
        InvalidInputError: *path* is not a ``tinker://`` path.
    """
    found = path.strip() if isinstance(path, str) else ""
    if not found.startswith(SCHEME) or len(found) == len(SCHEME) or not found.isprintable():
        raise InvalidInputError(
            f"{path!r} is not a checkpoint path",
            hint="It must start with tinker://, as in tinker://<run>/weights/<name>; "
            "save_state(...).result().path returns one.",
        )
    return found


def check_model_name(base_model: object) -> str:
    """Return the name of a base model without surrounding whitespace.

    Raises:
        InvalidInputError: *base_model* is not a name.
    """
    name = base_model.strip() if isinstance(base_model, str) else ""
    if not name:
        raise InvalidInputError(f"base_model is {base_model!r}; give the name of a model")
    return name


@dataclasses.dataclass(frozen=True)
class ParsedCheckpointTinkerPath:
    """The parts of a path of three segments: ``tinker://<training_run_id>/<kind>/<name>``.

    ``checkpoint_type`` is training, sampler or external; ``checkpoint_id`` is ``<kind>/<name>``.
    """

    tinker_path: str
    training_run_id: str
    checkpoint_type: str
    checkpoint_id: str

    @classmethod
    def from_tinker_path(cls, tinker_path: str) -> ParsedCheckpointTinkerPath:
        """Parse *tinker_path*; raise InvalidInputError if it has another form."""
        tinker_path = check_tinker_path(tinker_path)
        parts = tinker_path[len(SCHEME) :].split("/")
        if len(parts) != 3 or not all(parts) or parts[1] not in KINDS:
            raise InvalidInputError(
                f"{tinker_path!r} does not name a checkpoint of a training run",
                hint=f"Expected tinker://<run>/<kind>/<name> with kind one of {', '.join(KINDS)}.",
            )
        run, kind, name = parts
        return cls(tinker_path, run, KINDS[kind], f"{kind}/{name}")


def locate_checkpoint(tinker_path: str) -> ParsedCheckpointTinkerPath:
    """Parse a path that names a run and a checkpoint of it, in any form that known servers use.

    Some servers use ``tinker://<run>/<name>``, or their own kinds (docs/servers.md).  The type is
    then ``unknown``, and the id is everything after the run.

    Raises:
        InvalidInputError: *tinker_path* does not name both a run and a checkpoint.
    """
    tinker_path = check_tinker_path(tinker_path)
    run, _, rest = tinker_path[len(SCHEME) :].partition("/")
    parts = rest.split("/")
    if not run or not all(parts) or (parts[0] in KINDS and len(parts) != 2):
        raise InvalidInputError(
            f"{tinker_path!r} does not name a checkpoint of a training run",
            hint="A path looks like tinker://<run>/weights/<name>; save_state(...).result().path "
            "and the list of checkpoints hold such paths.",
        )
    kind = KINDS.get(parts[0], "unknown")
    return ParsedCheckpointTinkerPath(tinker_path, run, kind, rest)


def session_url(session_id: str) -> str:
    """Return the URL of a session's page."""
    return f"{CONSOLE}/sessions/{quote(session_id, safe=':')}"


def training_run_url(model_id: str) -> str:
    """Return the URL of a training run's page."""
    return f"{CONSOLE}/training_runs/{quote(model_id, safe=':')}"


def checkpoint_url(tinker_path: str) -> str:
    """Return the URL of a checkpoint's page; *tinker_path* may have any server's form."""
    run, _, checkpoint = check_tinker_path(tinker_path)[len(SCHEME) :].partition("/")
    return f"{CONSOLE}/checkpoints/{quote(run, safe='')}/{quote(checkpoint, safe='')}"


def playground_url(tinker_path: str) -> str:
    """Return the URL of the page for sampling from a checkpoint."""
    path = quote(check_tinker_path(tinker_path), safe="")
    return f"{CONSOLE}/playground?mode=checkpoint&checkpoint={path}"
