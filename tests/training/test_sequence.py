"""SequenceRules: the seq_id of each request, tested without threads, server or clock."""

from __future__ import annotations

import random
import weakref
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Set, Tuple

import pytest
from hypothesis import given, settings, strategies as st

from tinkex._training.sequence import (
    Action,
    LostAction,
    Outcome,
    SequenceRules,
    classify,
    expected_seq_id,
)
from tinkex.errors import (
    APIConnectionError,
    APIError,
    APIStatusError,
    APITimeoutError,
    ClientClosedError,
    ConflictError,
    CredentialError,
    InternalServerError,
    RequestFailedError,
    ResponseDecodeError,
    RouteMissingError,
    status_error_type,
)


class Message(NamedTuple):
    path: str
    body: Any
    key: str = ""


class Events:
    """Sends requests, named by letters, with a given outcome; records the resulting actions."""

    def __init__(self, first_seq_id: int = 1) -> None:
        self.rules: SequenceRules[str, Message] = SequenceRules(first_seq_id)

    def send(self, request: str, outcome: Optional[Outcome] = None) -> Optional[Action]:
        seq_id = self.rules.begin()
        message = Message("/step", (request.rstrip("'"), seq_id))
        assert self.rules.before_send(message) is not None
        if outcome is None:
            self.rules.accepted(request, seq_id)
            return None
        return self.rules.send_failed(request, seq_id, outcome)

    def must_wait(self, request: str) -> bool:
        """Return whether the lost request must be resent before *request*."""
        return self.rules.before_send(Message("/step", (request, self.rules.begin()))) is None


@pytest.fixture
def events() -> Events:
    return Events()


# Rules 1 to 3: what uses a seq_id


@pytest.mark.parametrize("first", [1, 2])
def test_requests_get_consecutive_seq_ids(first: int) -> None:
    events = Events(first)
    for number, request in enumerate("abc", first):
        assert events.rules.next_seq_id == number
        events.send(request)


@pytest.mark.parametrize(
    ("outcome", "action", "uses"),
    [
        (Outcome.NOT_SENT, Action.REPORT, False),
        (Outcome.REFUSED, Action.REPORT, True),
        (Outcome.CONFLICT, Action.REPORT, True),
        (Outcome.UNREADABLE, Action.REPORT, True),
        (Outcome.UNREAD, Action.REPORT, False),
        (Outcome.NOT_ACCEPTED, Action.REPORT, False),
        (Outcome.UNKNOWN, Action.REPORT, False),
        (Outcome.CRASHED, Action.REPORT, False),
    ],
)
def test_a_failure_uses_the_seq_id_if_the_server_has_read_the_request(
    events: Events, outcome: Outcome, action: Action, uses: bool
) -> None:
    assert events.send("a", outcome) is action
    assert events.rules.next_seq_id == (2 if uses else 1)
    assert not events.rules.in_flight


@pytest.mark.parametrize("turned_away", [Outcome.UNREAD, Outcome.NOT_ACCEPTED])
def test_a_conflict_after_a_request_that_was_turned_away_moves_on_to_the_next_seq_id(
    events: Events, turned_away: Outcome
) -> None:
    events.send("a", turned_away)
    assert events.send("b", Outcome.CONFLICT) is Action.SEND_AGAIN
    assert events.rules.next_seq_id == 2
    assert events.send("b", Outcome.CONFLICT) is Action.REPORT  # this one is about b itself


def test_an_accepted_request_clears_an_earlier_rejection(events: Events) -> None:
    events.send("a", Outcome.UNREAD)
    events.send("b")
    assert events.send("c", Outcome.CONFLICT) is Action.REPORT


def test_the_body_of_an_accepted_request_is_not_kept(events: Events) -> None:
    class Body:
        pass

    body = Body()
    kept = weakref.ref(body)
    seq_id = events.rules.begin()
    events.rules.before_send(Message("/step", body))
    events.rules.accepted("a", seq_id)
    del body
    assert kept() is None


# Rule 4: a lost response


@pytest.mark.parametrize("outcome", [Outcome.UNKNOWN, Outcome.CRASHED])
def test_a_lost_request_keeps_its_seq_id_for_its_own_body(events: Events, outcome: Outcome) -> None:
    events.send("a", outcome)
    lost = events.rules.lost
    assert lost is not None
    assert (lost.request, lost.seq_id) == ("a", 1)
    assert events.must_wait("b")
    assert not events.must_wait("a")


def test_a_lost_request_is_resent_with_its_first_body(events: Events) -> None:
    first = Message("/step", "x", key="first")
    events.rules.begin()
    assert events.rules.before_send(first) is first
    events.rules.send_failed("a", 1, Outcome.UNKNOWN)
    assert events.rules.before_send(Message("/step", "x", key="second")) is first
    assert events.rules.before_send(Message("/other", "x")) is None


def test_a_repeated_call_takes_over_the_lost_request(events: Events) -> None:
    events.send("a", Outcome.UNKNOWN)
    events.send("a'", Outcome.UNKNOWN)
    assert events.rules.lost is not None
    assert events.rules.lost.request == "a'"


@pytest.mark.parametrize(
    ("outcome", "action", "next_seq_id", "still_lost"),
    [
        (None, None, 2, False),
        (Outcome.REFUSED, Action.REPORT, 2, False),
        (Outcome.CONFLICT, Action.REPORT_DONE, 2, False),
        (Outcome.UNREADABLE, Action.REPORT, 2, False),
        (Outcome.UNREAD, Action.REPORT, 1, True),
        (Outcome.UNKNOWN, Action.REPORT, 1, True),
        (Outcome.CRASHED, Action.REPORT, 1, True),
        (Outcome.NOT_SENT, Action.REPORT, 1, True),
        (Outcome.NOT_ACCEPTED, Action.REPORT, 1, False),
    ],
)
def test_a_repeated_call_after_a_lost_response(
    events: Events,
    outcome: Optional[Outcome],
    action: Optional[Action],
    next_seq_id: int,
    still_lost: bool,
) -> None:
    events.send("a", Outcome.UNKNOWN)
    assert events.send("a'", outcome) is action
    assert events.rules.next_seq_id == next_seq_id
    assert (events.rules.lost is not None) == still_lost


@pytest.mark.parametrize(
    ("outcome", "action", "next_seq_id", "still_lost"),
    [
        (Outcome.REFUSED, LostAction.CONTINUE, 2, False),
        (Outcome.CONFLICT, LostAction.CONTINUE, 2, False),
        (Outcome.UNREADABLE, LostAction.CONTINUE, 2, False),
        (Outcome.NOT_ACCEPTED, LostAction.CONTINUE, 1, False),
        (Outcome.CRASHED, LostAction.FILL, 1, True),
        (Outcome.UNKNOWN, LostAction.REPORT, 1, True),
        (Outcome.UNREAD, LostAction.REPORT, 1, True),
        (Outcome.NOT_SENT, LostAction.REPORT, 1, True),
    ],
)
def test_another_call_after_a_lost_response(
    events: Events, outcome: Outcome, action: LostAction, next_seq_id: int, still_lost: bool
) -> None:
    events.send("a", Outcome.UNKNOWN)
    assert events.must_wait("b")
    assert events.rules.lost_failed(outcome) is action
    assert events.rules.next_seq_id == next_seq_id
    assert (events.rules.lost is not None) == still_lost


@pytest.mark.parametrize(
    ("outcome", "action", "next_seq_id"),
    [
        *[(o, LostAction.CONTINUE, 2) for o in (Outcome.REFUSED, Outcome.CONFLICT)],
        (Outcome.UNREADABLE, LostAction.CONTINUE, 2),
        *[(o, LostAction.REPORT, 1) for o in (Outcome.CRASHED, Outcome.UNKNOWN, Outcome.UNREAD)],
        *[(o, LostAction.REPORT, 1) for o in (Outcome.NOT_ACCEPTED, Outcome.NOT_SENT)],
    ],
)
def test_a_filler_uses_the_seq_id_of_the_lost_request_only_if_it_was_read(
    events: Events, outcome: Outcome, action: LostAction, next_seq_id: int
) -> None:
    events.send("a", Outcome.UNKNOWN)
    assert events.rules.lost_failed(Outcome.CRASHED) is LostAction.FILL
    assert events.rules.filler_failed(outcome) is action
    assert events.rules.next_seq_id == next_seq_id
    assert (events.rules.lost is None) == (action is LostAction.CONTINUE)


@pytest.mark.parametrize("outcome", [Outcome.UNKNOWN, Outcome.CRASHED])
def test_a_filler_that_may_have_been_executed_must_be_confirmed(
    events: Events, outcome: Outcome
) -> None:
    events.send("a", Outcome.UNKNOWN)
    events.rules.lost_failed(Outcome.CRASHED)
    assert events.rules.filler_failed(outcome) is LostAction.REPORT
    events.send("a'", Outcome.NOT_ACCEPTED)
    events.send("a'", Outcome.UNKNOWN)
    assert events.rules.lost_failed(Outcome.NOT_ACCEPTED) is LostAction.FILL


def test_a_request_that_was_lost_again_and_never_accepted_needs_no_filler(
    events: Events,
) -> None:
    events.send("a", Outcome.UNKNOWN)
    assert events.rules.lost_failed(Outcome.UNKNOWN) is LostAction.REPORT
    assert events.rules.lost_failed(Outcome.NOT_ACCEPTED) is LostAction.CONTINUE
    assert events.rules.next_seq_id == 1


def test_a_filler_for_one_lost_request_does_not_count_for_the_next(events: Events) -> None:
    for request in "ab":
        events.send(request)
    events.send("c", Outcome.UNKNOWN)
    events.rules.lost_failed(Outcome.CRASHED)
    events.rules.filler_failed(Outcome.UNKNOWN)
    assert events.rules.lost_failed(Outcome.CONFLICT, 2) is LostAction.CONTINUE
    events.send("d", Outcome.UNKNOWN)
    assert events.rules.lost_failed(Outcome.NOT_ACCEPTED) is LostAction.CONTINUE


def test_a_lost_request_that_is_accepted_has_used_its_seq_id(events: Events) -> None:
    events.send("a", Outcome.UNKNOWN)
    events.rules.lost_accepted()
    assert events.rules.lost is None
    assert not events.rules.in_flight  # its future has failed, so nothing polls for it
    assert not events.must_wait("b")
    assert events.rules.next_seq_id == 2


@pytest.mark.parametrize(("expected", "next_seq_id"), [(5, 5), (2, 4)])
def test_a_server_that_names_the_seq_id_it_expects_has_executed_the_lost_request_or_never_will(
    events: Events, expected: int, next_seq_id: int
) -> None:
    for request in "abc":
        events.send(request)
    events.send("d", Outcome.UNKNOWN)
    assert events.rules.lost_failed(Outcome.CONFLICT, expected) is LostAction.CONTINUE
    assert events.rules.lost is None
    assert events.rules.next_seq_id == next_seq_id


# Rules 5 to 7: the server expects another seq_id


def in_flight(events: Events, requests: str) -> None:
    for request in requests:
        events.send(request)


def test_requests_refused_for_their_seq_id_are_resent_in_order_once_nothing_is_in_flight(
    events: Events,
) -> None:
    in_flight(events, "abcd")
    rules = events.rules
    rules.settled("a", done=False)  # it failed, so the server does not count it
    assert rules.out_of_order("c", 3, 1) is Action.RESEND_LATER
    assert rules.out_of_order("b", 2, 1) is Action.RESEND_LATER
    assert rules.has_refused
    assert rules.in_flight
    assert rules.out_of_order("d", 4, 1) is Action.RESEND_LATER
    assert not rules.in_flight
    assert rules.take_resends() == ["b", "c", "d"]
    assert rules.next_seq_id == 1
    assert not rules.has_refused


def test_a_request_refused_on_submission_is_resent_too(events: Events) -> None:
    in_flight(events, "a")
    events.rules.settled("a", done=False)
    assert events.rules.out_of_order("b", events.rules.begin(), 1) is Action.RESEND_LATER
    assert events.rules.take_resends() == ["b"]
    assert events.rules.next_seq_id == 1


def test_the_last_refusal_names_the_seq_id_to_continue_from(events: Events) -> None:
    in_flight(events, "abc")
    events.rules.settled("a", done=True)
    events.rules.out_of_order("b", 2, 5)
    events.rules.out_of_order("c", 3, 2)
    assert events.rules.take_resends() == ["c"]
    assert events.rules.next_seq_id == 2


def test_a_later_seq_id_means_that_an_earlier_attempt_was_executed(events: Events) -> None:
    in_flight(events, "a")
    assert events.rules.out_of_order("b", 2, 3) is Action.REPORT_DONE
    assert events.rules.take_resends() == []
    assert events.rules.next_seq_id == 3


def test_a_repeated_call_that_was_executed_is_no_longer_lost(events: Events) -> None:
    events.send("a", Outcome.UNKNOWN)
    assert events.rules.out_of_order("a'", events.rules.begin(), 2) is Action.REPORT_DONE
    assert events.rules.lost is None


def test_a_server_that_expects_the_seq_id_of_finished_work_has_lost_the_run(events: Events) -> None:
    in_flight(events, "ab")
    events.rules.settled("a", done=True)
    assert events.rules.out_of_order("b", 2, 1) is Action.REPORT_LOST_RUN
    assert not events.rules.has_refused


def test_a_withdrawn_request_is_not_resent(events: Events) -> None:
    in_flight(events, "ab")
    events.rules.out_of_order("a", 2, 1)
    events.rules.out_of_order("b", 3, 1)
    events.rules.withdraw("a")
    assert events.rules.take_resends() == ["b"]


def test_settling_a_request_that_is_not_in_flight_changes_nothing(events: Events) -> None:
    events.rules.settled("a", done=True)
    in_flight(events, "b")
    events.rules.settled("b", done=True)
    events.rules.settled("b", done=True)
    assert events.rules.next_seq_id == 2
    assert not events.rules.in_flight


# Reading errors


def of_status(status: int, message: str = "no", *, maybe_taken: bool = False) -> APIStatusError:
    error = status_error_type(status)(message, status=status)
    error.maybe_taken = maybe_taken
    return error


def broken(maybe_taken: bool, make: Callable[[str], APIError] = APIConnectionError) -> APIError:
    error = make("no response")
    error.maybe_taken = maybe_taken
    return error


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        *[(of_status(status), Outcome.REFUSED) for status in (400, 404, 410, 422)],
        *[(of_status(status, maybe_taken=True), Outcome.REFUSED) for status in (400, 422)],
        *[(of_status(status), Outcome.UNREAD) for status in (401, 402, 403, 408, 429)],
        *[(of_status(s, maybe_taken=True), Outcome.UNKNOWN) for s in (401, 429, 413, 502, 503)],
        *[(of_status(status), Outcome.NOT_ACCEPTED) for status in (405, 413, 501)],
        (of_status(409), Outcome.CONFLICT),
        (of_status(500, maybe_taken=True), Outcome.CRASHED),
        (broken(True), Outcome.UNKNOWN),
        (broken(True, APITimeoutError), Outcome.UNKNOWN),
        (broken(False), Outcome.UNREAD),
        (ResponseDecodeError("what is this"), Outcome.UNREADABLE),
        (RouteMissingError("no route", status=404), Outcome.NOT_SENT),
        (CredentialError("no key"), Outcome.NOT_SENT),
        (ClientClosedError("closed"), Outcome.NOT_SENT),
        (OSError("a bug"), Outcome.NOT_SENT),
    ],
)
def test_what_an_error_means_for_the_seq_id(error: BaseException, outcome: Outcome) -> None:
    assert classify(error) is outcome


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConflictError("expected 20, got 21", status=409), 20),
        (ConflictError("Sequence conflict: expected 22, got 21.", status=409), 22),
        (RequestFailedError("Future failed: Sequence conflict: expected 20, got 21"), 20),
        (RequestFailedError("expected 20, got 21", status=409), 20),
        (RequestFailedError("expected 20, got 21"), None),  # may be about tensors
        (ConflictError("expected 20, got 19", status=409), None),  # about another request
        (ConflictError("expected 21, got 21", status=409), None),
        (ConflictError("the seq_id was used", status=409), None),
        (InternalServerError("Sequence conflict: expected 20, got 21", status=500), None),
        (OSError("expected 20, got 21"), None),
    ],
)
def test_the_seq_id_that_a_server_expects_is_found_in_its_message(
    error: BaseException, expected: Optional[int]
) -> None:
    assert expected_seq_id(error, 21) == expected


# All rules together, against servers that count differently and lose messages


class Call:
    """A call of the user; a repeated call has the same *name*."""

    def __init__(self, name: str, fails: bool = False) -> None:
        self.name = name
        self.fails = fails
        self.outcomes: List[str] = []  # at most one

    @property
    def done(self) -> bool:
        return bool(self.outcomes)

    def settle(self, outcome: str) -> None:
        if self.outcomes != ["cancelled"]:  # a result may arrive after a cancel
            self.outcomes.append(outcome)


class Failed(Exception):
    """What the client sees if a request is not accepted."""

    def __init__(self, outcome: Outcome, expected: Optional[int] = None) -> None:
        self.outcome = outcome
        self.expected = expected


#: What may happen to a request; the last three happen after the server has accepted it.
FATES = ["arrives"] * 6
FATES += ["unread", "too large", "refused", "lost", "crashes", "mute", "dies", "misreported"]


class Server:
    """Executes calls like one kind of server.

    kind: ``"ordered"`` waits for a missing seq_id, and rejects a second body; ``"first"`` returns
        the first result of a seq_id whatever the body is; ``"strict"`` counts only successes, and
        fails a request with any other seq_id, immediately (``"strict, 409"``) or when it is polled
        for.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.executed: List[str] = []
        self.results: Dict[int, Tuple[str, str]] = {}  # seq_id -> name, result
        self.expected = 1
        self._fails: Set[str] = set()

    def receive(self, seq_id: int, name: str, fails: bool, fate: str) -> Callable[[], Any]:
        """Return a function that polls for the result; raise Failed if the call is not accepted."""
        known = seq_id in self.results or (self.kind.startswith("strict") and name in self.executed)
        if fate == "unread" or (fate == "misreported" and self.kind != "ordered"):
            raise Failed(Outcome.UNREAD)
        if fate == "lost":
            raise Failed(Outcome.UNKNOWN)
        if fate == "crashes":
            raise Failed(Outcome.CRASHED)
        if fate == "too large" and not known:
            raise Failed(Outcome.NOT_ACCEPTED)
        if fate == "refused" and not known:
            if not self.kind.startswith("strict"):
                self._record(seq_id, name, fails=True)
            raise Failed(Outcome.REFUSED)
        poll = self._accept(seq_id, name, fails)
        after = {"mute": Outcome.UNKNOWN, "dies": Outcome.CRASHED, "misreported": Outcome.UNREAD}
        if fate in after:
            raise Failed(after[fate])
        return poll

    def _accept(self, seq_id: int, name: str, fails: bool) -> Callable[[], Any]:
        if self.kind.startswith("strict"):
            return self._count(seq_id, name, fails)
        if seq_id in self.results:
            known = self.results[seq_id][0]
            if self.kind == "ordered" and known != name:
                raise Failed(Outcome.CONFLICT)
        else:
            self._record(seq_id, name, fails)
        return lambda: self._result(seq_id)

    def _result(self, seq_id: int) -> Any:
        if self.kind == "ordered":
            assert seq_id < self.expected, "the server waits for a missing seq_id"
        return self.results[seq_id]

    def _record(self, seq_id: int, name: str, fails: bool) -> None:
        self.results[seq_id] = name, "fails" if fails else "succeeds"
        if self.kind == "first":
            self._execute(seq_id)
        while self.kind == "ordered" and self.expected in self.results:
            self._execute(self.expected)
            self.expected += 1

    def _execute(self, seq_id: int) -> None:
        name, result = self.results[seq_id]
        if result == "succeeds" and name != "filler":
            self.executed.append(name)

    def _count(self, seq_id: int, name: str, fails: bool) -> Callable[[], Any]:
        if seq_id != self.expected:
            conflict = Failed(Outcome.CONFLICT, self.expected)
            if self.kind == "strict, 409":
                raise conflict
            return lambda: conflict
        if not fails:
            self.expected += 1
            if name != "filler":
                self.executed.append(name)
        return lambda: (name, "fails" if fails else "succeeds")


class Client:
    """Behaves like RunQueue, on one thread and without a network."""

    def __init__(self, server: Server, draw: Callable[[List[Any]], Any]) -> None:
        self.rules: SequenceRules[Call, Message] = SequenceRules()
        self.server = server
        self.draw = draw
        self.faulty = True
        self.polls: List[Tuple[Call, int, Callable[[], Any]]] = []
        self.refused: List[Call] = []

    def send(self, call: Call) -> None:
        while self.rules.has_refused and self.rules.in_flight:
            self.poll()
        for refused in self.rules.take_resends():
            self.transmit(refused)
        self.transmit(call)

    def transmit(self, call: Call) -> None:
        while not call.done:
            seq_id = self.rules.begin()
            message = self.rules.before_send(Message(call.name, (seq_id, call.fails)))
            try:
                if message is None:
                    self.resend_lost()
                    continue
                poll = self.post(message)
            except Failed as failed:
                if message is None:
                    call.settle("lost")
                elif failed.expected is not None:
                    self.out_of_order(call, seq_id, failed.expected)
                    return
                else:
                    action = self.rules.send_failed(call, seq_id, failed.outcome)
                    if action is not Action.SEND_AGAIN:
                        call.settle(action.name)
            else:
                self.rules.accepted(call, seq_id)
                self.polls.append((call, seq_id, poll))
                return

    def post(self, message: Message) -> Callable[[], Any]:
        fate = self.draw(FATES) if self.faulty else "arrives"
        seq_id, fails = message.body
        return self.server.receive(seq_id, message.path, fails, fate)

    def resend_lost(self) -> None:
        lost = self.rules.lost
        assert lost is not None
        filler = Message("filler", (lost.seq_id, False))
        for message, on_failure in (
            (lost.message, self.rules.lost_failed),
            (filler, self.rules.filler_failed),
        ):
            try:
                self.post(message)
            except Failed as failed:
                action = on_failure(failed.outcome, failed.expected)
                if action is LostAction.CONTINUE:
                    return
                if action is LostAction.REPORT:
                    raise
            else:
                self.rules.lost_accepted()
                return

    def poll(self) -> None:
        call, seq_id, poll = self.polls.pop(0)
        result = "cancelled" if call.done else poll()
        if isinstance(result, Failed):
            assert result.expected is not None
            self.out_of_order(call, seq_id, result.expected)
        elif result != "cancelled":
            name, outcome = result
            assert name == call.name, "the result of another request"
            call.settle(outcome)
            self.rules.settled(call, done=outcome == "succeeds")

    def out_of_order(self, call: Call, seq_id: int, expected: int) -> None:
        action = self.rules.out_of_order(call, seq_id, expected)
        assert action is not Action.REPORT_LOST_RUN
        if action is Action.REPORT_DONE:
            assert call.name in self.server.executed
            call.settle("DONE")
            self.rules.settled(call, done=False)

    def cancel(self, call: Call) -> None:
        if not call.done:
            call.settle("cancelled")
            self.rules.settled(call, done=False)

    def finish(self) -> None:
        """Settle everything, without further faults."""
        self.faulty = False
        while self.polls or self.rules.has_refused:
            while self.polls:
                self.poll()
            for refused in self.rules.take_resends():
                self.transmit(refused)


@pytest.mark.parametrize("kind", ["ordered", "first", "strict", "strict, 409"])
@settings(max_examples=300, deadline=None)
@given(chances=st.randoms(use_true_random=True))
def test_calls_are_executed_at_most_once_in_order_and_settled_once(
    kind: str, chances: random.Random
) -> None:
    draw = chances.choice
    server = Server(kind)
    client = Client(server, draw)
    calls: List[Call] = []
    for number in range(chances.randint(1, 15)):
        last = calls[-1] if calls else None
        lost = client.rules.lost
        if lost is not None and lost.request is last and draw([True, False]):
            call = Call(last.name, last.fails)  # the same call repeated
        else:
            call = Call(f"{number:02}", fails=draw([False, False, True]))
        calls.append(call)
        client.send(call)
        for _ in range(draw([0, 0, 1, 3])):
            if client.polls:
                client.poll()
        if draw([False] * 5 + [True]):
            client.cancel(draw(calls))
    client.finish()
    last = Call("99")
    client.send(last)
    client.finish()
    assert last.outcomes == ["succeeds"]  # the run continues
    assert all(len(call.outcomes) == 1 for call in calls)
    assert server.executed == sorted(set(server.executed))
    assert {call.name for call in calls if call.outcomes == ["succeeds"]} <= set(server.executed)
