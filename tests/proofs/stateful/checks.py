"""Properties that must hold once all calls are settled, whatever the order and the faults."""

from __future__ import annotations

import collections
import itertools
import json
from concurrent.futures import CancelledError
from typing import Any, Counter, Dict, Iterator, List, Optional, Set, Tuple

from proofs.stateful.calls import Call
from proofs.stateful.storms import Storm, by_name
from proofs.stateful.witness import Key, label_of
from proofs.stateful.world import World

from tinkex import errors
from tinkex.testing.journal import ReceivedRequest
from tinkex.wire.codec import codec_for

#: Keys that may be requested more than once.
_AMBIGUOUS = ("load", "snapshot", "create")
#: After these the client counts the seq_id as used, and a server that has not seen it reports that.
_GAPS = (400, 404, 409, 410, 422)


def wrong_calls(world: World) -> Iterator[str]:
    """Check the outcome of every call; all must be settled."""
    failures: Set[int] = set()
    for call in world.calls:
        if call.error is None:
            if call.scope.over is not None and call.began > call.scope.over and call.keys:
                yield f"acknowledged after the end of its session: {call}"
        elif not _is_explained(world, call, call.error):
            yield f"failed without a reason: {call}"
        elif _status_or_type(call.error):
            failures.add(id(call.error))
    strikes = sum(storm.strikes for storm in world.storms if storm.group == "failing")
    if len(failures) > strikes:
        yield f"{len(failures)} calls failed, of {strikes} that faults have struck"


def _is_explained(world: World, call: Call, error: BaseException) -> bool:
    if isinstance(error, CancelledError):
        return call.cancelled or (call.after is not None and not call.after.acknowledged)
    if isinstance(error, errors.ClientClosedError):
        return call.scope.closing is not None
    if isinstance(error, errors.IncompleteGradientError):
        return error.__cause__ is not None and any(
            other.owner == call.owner and len(other.keys) > 1 and not other.acknowledged
            for other in world.calls
        )
    ended = call.scope.over is not None or world.ended_at >= call.scope.opened_at
    if isinstance(error, errors.SessionLostError):
        return ended
    if isinstance(error, errors.NotFoundError) and ended:
        lost = by_name(world.storms, "restart without state") or world.was_forgotten
        if lost:
            return True
    return any(_may_cause(storm, error) for storm in world.storms if storm.group == "failing")


def _may_cause(storm: Storm, error: BaseException) -> bool:
    if not storm.strikes:
        return False
    if storm.name in ("truncated", "garbled"):
        return isinstance(error, errors.ResponseDecodeError)
    if storm.name == "expired result":
        return isinstance(error, errors.ResultExpiredError)
    found: Optional[BaseException] = error
    while found is not None:
        if getattr(found, "status", None) == storm.status:
            return isinstance(error, errors.TinkexError)
        found = found.__cause__
    return False


def _status_or_type(error: BaseException) -> bool:
    """Whether *error* belongs to the call that the fault struck, not to one that depends on it."""
    followers = (
        CancelledError,
        errors.ClientClosedError,
        errors.IncompleteGradientError,
        errors.SessionLostError,
        errors.NotFoundError,
    )
    return not isinstance(error, followers)


# Executed work


def wrong_executions(world: World) -> Iterator[str]:
    """Check that acknowledged work was executed once, other work at most once, and in order."""
    by_owner: Dict[str, List[Key]] = collections.defaultdict(list)
    for owner, key in world.server.log.entries:
        by_owner[owner].append(("snapshot",) if key[0] == "snapshot" else key)
    calls_of: Dict[str, List[Call]] = collections.defaultdict(list)
    for call in world.calls:
        if not call.repeated:
            calls_of[call.owner].append(call)
    for owner, executed in by_owner.items():
        if owner in calls_of:
            yield from _wrong_counts(calls_of[owner], executed)
            yield from _wrong_order(calls_of[owner], executed)
            yield from _wrong_steps(calls_of[owner], executed)
        # Otherwise it is a run or sampler whose creation failed.
        elif any(key[0] not in ("create", "load") for key in executed):
            yield f"{owner} was not asked for, and has {executed}"
    for owner, calls in calls_of.items():
        if owner not in by_owner and any(call.acknowledged and call.keys for call in calls):
            yield f"{owner} was acknowledged, and nothing was executed"


def _wrong_counts(calls: List[Call], executed: List[Key]) -> Iterator[str]:
    counts = collections.Counter(executed)
    most: Counter[Key] = collections.Counter()
    least: Counter[Key] = collections.Counter()
    for call in calls:
        if not call.never_sent:
            most.update(call.keys)
        if call.acknowledged:
            least.update(call.keys)
    for key, count in counts.items():
        if count > most[key] and not (key[0] == "sample" and most[key]):
            yield f"{key} was executed {count} times, and asked for {most[key]} times"
    for key, count in least.items():
        if counts[key] < count:
            yield f"{key} was acknowledged {count} times, and executed {counts[key]} times"


def _wrong_order(calls: List[Call], executed: List[Key]) -> Iterator[str]:
    """Check that a call that returned before another began was executed before it."""
    places = {key: i for i, key in enumerate(executed) if key[0] not in _AMBIGUOUS}
    ordered: List[Tuple[Call, List[int]]] = []
    for call in calls:
        if call.kind != "sample":  # these run in any order
            own = [places[key] for key in call.keys if key in places]
            if own != sorted(own):
                yield f"the parts of {call} were executed in the order {own}"
            if own:
                ordered.append((call, own))
    for (first, before), (second, after) in itertools.permutations(ordered, 2):
        comes_first = first.returned < second.began or second.after is first
        if comes_first and max(before) > min(after):
            yield f"{second} was executed before {first}"


def _wrong_steps(calls: List[Call], executed: List[Key]) -> Iterator[str]:
    """Check that no optimizer step was taken on a part of a batch."""
    batches = [call.keys for call in calls if call.kind == "forward_backward" and call.keys[1:]]
    gradient: Set[Key] = set()
    for key in executed:
        if key[0] == "forward_backward":
            gradient.add(key)
        elif key[0] == "load":
            gradient.clear()
        elif key[0] == "optim_step":
            for parts in batches:
                if gradient.intersection(parts) and not gradient.issuperset(parts):
                    yield f"{key} was taken on a part of {parts}"
            gradient.clear()


def wrong_results(world: World) -> Iterator[str]:
    """Check that each result belongs to its call."""
    for call in world.calls:
        if call.acknowledged and call.kind in ("forward", "forward_backward", "optim_step"):
            labels = float(sum(sum(key[1:]) for key in call.keys))
            found = call.outcome.value.metrics.get("labels:sum")
            if found != labels:
                yield f"{call} has the result of {found}"
        if call.acknowledged and call.kind in ("save", "export"):
            path = call.outcome.value.path
            if not path.endswith(f"/{call.keys[0][1]}") or call.owner not in path:
                yield f"{call} has the path {path}"


# Sent requests


def wrong_bodies(world: World) -> Iterator[str]:
    """Check that no seq_id was sent with two bodies.

    Exceptions by the protocol (docs/protocol.md, "Sequence numbers"): a refused request has not
    used its seq_id, or leaves a gap that later requests fill, and a request that always fails with
    500 is replaced by a pass without effect.
    """
    refused = {
        request.index
        for storm in world.storms
        if storm.refuses
        for request in storm.injection.struck
    }
    with_gap: Set[Any] = set()
    bodies: Dict[Tuple[Any, ...], Dict[Any, ReceivedRequest]] = collections.defaultdict(dict)
    for request in world.server.journal.requests:
        for slot, body in _numbered(request):
            if request.index in refused:
                with_gap.add(slot[1])
            elif not _is_filler(body):
                bodies[slot].setdefault(body, request)
    for slot, found in bodies.items():
        if len(found) > 1 and slot[1] not in with_gap:
            yield f"{slot} was sent with {len(found)} bodies: {list(found)}"


def _numbered(request: ReceivedRequest) -> Iterator[Tuple[Tuple[Any, ...], Any]]:
    """Return a request's seq_id with its owner, and its body without fields that may differ."""
    if request.method != "POST" or not request.body:
        return
    if request.path in ("/api/v1/forward_backward", "/api/v1/forward"):
        asked = codec_for(request.headers["content-type"]).decode_forward_backward(request.body)
        only = asked.forward_only or request.path.endswith("forward")
        labels = tuple(label_of(one) for one in asked.data)
        yield ("seq_id", asked.model_id, asked.seq_id), ("pass", only, labels)
        return
    try:
        body = json.loads(request.body)
    except ValueError:
        return
    if not isinstance(body, dict):
        return
    for owner, number in (
        ("model_id", "seq_id"),
        ("sampling_session_id", "seq_id"),
        ("session_id", "model_seq_id"),
        ("session_id", "sampling_session_seq_id"),
    ):
        if owner in body and number in body:
            slot = (number, body[owner], body[number])
            # A save for this session has another number each time it is sent.
            body = {k: v for k, v in body.items() if k != "sampling_session_seq_id"}
            yield slot, (request.path, json.dumps(body, sort_keys=True))


def _is_filler(body: Any) -> bool:
    return body == ("pass", True, (0,))


#: Counters for the summary of a long run.
def strikes_by_name(storms: List[Storm]) -> Counter[str]:
    counts: Counter[str] = collections.Counter()
    for storm in storms:
        counts[storm.name] += storm.strikes
    return counts
