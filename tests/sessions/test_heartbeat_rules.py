"""SessionTable and BeatQueue: the rules of heartbeats, with a clock that the test sets."""

from __future__ import annotations

from typing import List, Optional

import pytest

from tinkex._sessions.beat_queue import OVERDUE_S, BeatQueue
from tinkex._sessions.session_table import HeartbeatPolicy, SessionTable, Verdict

TEN = HeartbeatPolicy(interval_s=10)


def table_with(policy: HeartbeatPolicy = TEN, *session_ids: str) -> SessionTable:
    table = SessionTable()
    for session_id in session_ids or ("a",):
        table.add(session_id, policy, now=0, phase=0.5)
    return table


def beat(table: SessionTable, now: float, status: Optional[int]) -> Verdict:
    """Send the heartbeat that is due at *now*, with an immediate response."""
    assert table.take_due(now) == ["a"]
    verdict = table.record("a", status=status, error=None if status else "no answer", now=now)
    assert verdict is not None
    return verdict


@pytest.mark.parametrize("phase", [0.0, 0.25, 0.999])
def test_the_first_beat_comes_at_the_phase_of_the_interval(phase: float) -> None:
    table = SessionTable()
    table.add("a", TEN, now=100, phase=phase)
    assert table.next_due() == 100 + 10 * phase
    assert table.take_due(100 + 10 * phase) == ["a"]
    assert table.next_due() == 110 + 10 * phase


def test_each_session_keeps_its_own_interval() -> None:
    table = SessionTable()
    table.add("slow", HeartbeatPolicy(interval_s=10), now=0, phase=0)
    table.add("fast", HeartbeatPolicy(interval_s=4), now=0, phase=0)
    beats: List[str] = []
    for now in range(20):
        for session_id in table.take_due(now):
            beats.append(session_id)
            table.record(session_id, status=200, error=None, now=now)
    assert beats.count("slow") == 2
    assert beats.count("fast") == 5


def test_missed_beats_are_sent_as_one_and_the_phase_is_kept() -> None:
    table = table_with()
    assert table.take_due(now=37) == ["a"]  # 5, 15, 25 and 35 have passed
    assert table.next_due() == 45


def test_a_session_has_one_beat_in_flight() -> None:
    table = table_with()
    assert table.take_due(5) == ["a"]
    assert table.take_due(15) == []  # the beat of 5 is still in flight
    assert table.next_due() == 25  # the next one is scheduled nevertheless
    table.record("a", status=200, error=None, now=16)
    assert table.take_due(25) == ["a"]


def test_the_next_beat_is_scheduled_before_the_current_one_is_sent() -> None:
    table = table_with()
    table.take_due(5)
    assert table.next_due() == 15


@pytest.mark.parametrize("status", [404, 410])
def test_a_session_that_the_server_does_not_know_is_forgotten_immediately(status: int) -> None:
    table = table_with()
    assert beat(table, 5, 200).kind == "fine"
    verdict = beat(table, 15, status)
    assert (verdict.kind, verdict.removed, verdict.first_beat) == ("gone", True, False)
    assert table.snapshots() == []
    assert table.next_due() is None
    assert table.take_due(1000) == []


def test_only_the_very_first_beat_counts_as_first() -> None:
    assert beat(table_with(), 5, 404).first_beat
    table = table_with()
    beat(table, 5, 503)  # an outage, in which the server forgot the session
    assert not beat(table, 15, 404).first_beat


@pytest.mark.parametrize("status", [400, 401, 403, 409, 422])
def test_other_user_errors_remove_the_session_once_a_second_beat_confirms(
    status: int,
) -> None:
    table = table_with()
    first = beat(table, 5, status)
    assert (first.kind, first.removed, first.confirm) == ("failing", False, True)
    assert table.next_due() == 7  # soon, not after the interval of 10 s
    second = beat(table, 7, status)
    assert (second.kind, second.removed, second.status) == ("refused", True, status)
    assert table.snapshots() == []


@pytest.mark.parametrize("then", [200, None, 503, 403])
def test_one_stray_user_error_does_not_end_a_session(then: Optional[int]) -> None:
    table = table_with()
    beat(table, 5, 401)
    assert not beat(table, 7, then).removed
    assert table.next_due() == (9 if then == 403 else 17)  # 403 comes for the first time
    assert not beat(table, 17, 401).removed
    assert [snapshot.session_id for snapshot in table.snapshots()] == ["a"]


@pytest.mark.parametrize("status", [None, 302, 408, 429, 500, 502, 503, 504])
def test_other_responses_keep_the_session(status: Optional[int]) -> None:
    table = table_with()
    verdict = beat(table, 5, status)
    assert (verdict.kind, verdict.removed) == ("failing", False)
    assert table.next_due() == 15
    assert table.snapshots()[0].state == "failing"


def test_silence_gives_one_warning_then_one_a_minute_then_the_recovery() -> None:
    table = table_with(HeartbeatPolicy(interval_s=10, warn_after_s=120))
    kinds = {now: beat(table, now, 503).kind for now in range(5, 305, 10)}
    assert [now for now, kind in kinds.items() if kind == "warn"] == [125, 185, 245]
    recovered = beat(table, 305, 200)
    assert (recovered.kind, recovered.silent_s) == ("recovered", 305)
    assert beat(table, 315, 200).kind == "fine"


def test_an_outage_without_a_warning_ends_silently() -> None:
    table = table_with()
    assert beat(table, 5, 503).kind == "failing"
    assert beat(table, 15, 200).kind == "fine"


def test_limits_are_off_by_default() -> None:
    table = table_with()
    for now in range(5, 100_005, 10):
        assert not beat(table, now, None).removed


def test_a_number_of_consecutive_failures_can_be_the_limit() -> None:
    table = table_with(HeartbeatPolicy(interval_s=10, max_failures=3))
    assert [beat(table, now, 500).kind for now in (5, 15)] == ["failing", "failing"]
    assert beat(table, 25, 200).kind == "fine"  # which restarts the count
    kinds = [beat(table, now, 500).kind for now in (35, 45, 55)]
    assert kinds == ["failing", "failing", "limit"]
    assert table.snapshots() == []


def test_a_time_without_success_can_be_the_limit() -> None:
    table = table_with(HeartbeatPolicy(interval_s=10, max_failure_s=30))
    assert beat(table, 5, 200).kind == "fine"
    assert [beat(table, now, 500).kind for now in (15, 25)] == ["failing", "failing"]
    verdict = beat(table, 35, 500)
    assert (verdict.kind, verdict.silent_s, verdict.failures) == ("limit", 30, 3)


def test_a_response_for_a_stopped_session_is_ignored() -> None:
    table = table_with()
    table.take_due(5)
    table.remove("a")
    assert table.record("a", status=200, error=None, now=6) is None
    assert table.snapshots() == []
    table.remove("a")  # stopping twice is harmless
    assert table.snapshots() == []


def test_after_a_sleep_every_session_is_due() -> None:
    table = table_with(TEN, "a", "b", "c")
    table.take_due(5)  # all were in flight when the machine slept
    table.record("a", status=200, error=None, now=5)
    table.beat_all_at(now=7)
    assert table.take_due(7) == ["a"]  # the others are already in flight
    assert table.next_due() == 17


def test_a_snapshot_has_the_known_facts() -> None:
    table = table_with()
    beat(table, 5, 200)
    table.take_due(15)
    table.record("a", status=None, error="connection refused", now=16)
    (snapshot,) = table.snapshots()
    assert snapshot.session_id == "a"
    assert (snapshot.created, snapshot.last_success) == (0, 5)
    assert (snapshot.consecutive_failures, snapshot.last_error) == (1, "connection refused")
    assert snapshot.state == "failing"


def sent(queue: BeatQueue, now: float = 0.0) -> List[str]:
    """Take the beats that may be sent now."""
    taken: List[str] = []
    while True:
        item = queue.take(now)
        if item is None:
            return taken
        taken.append(item[1])


def test_hosts_take_turns() -> None:
    queue = BeatQueue(4)
    for number in range(3):
        queue.put("a", f"a{number}")
    queue.put("b", "b0")
    assert sent(queue) == ["a0", "b0", "a1"]


def test_a_single_host_may_use_all_workers() -> None:
    queue = BeatQueue(8)
    for number in range(20):
        queue.put("a", f"a{number}")
    assert len(sent(queue)) == 8


def test_an_unresponsive_host_gets_one_worker() -> None:
    queue = BeatQueue(8)
    queue.put("a", "a0")
    sent(queue, 0.0)
    queue.done("a", 0.0, 0.9, responded=False)
    for number in range(5):
        queue.put("a", f"a{number}")
    assert sent(queue, 1.0) == ["a0"]
    queue.done("a", 1.0, 1.9, responded=True)
    assert len(sent(queue, 2.0)) == 4


def test_unresponsive_hosts_together_get_half_of_the_workers() -> None:
    queue = BeatQueue(8)
    hosts = [f"dead{number}" for number in range(9)]
    for host in hosts:
        queue.put(host, host)
        assert queue.take(0.0) == (host, host)
        queue.done(host, 0.0, 0.9, responded=False)
    for host in [*hosts, "alive"]:
        queue.put(host, host)
    taken = sent(queue, 1.0)
    assert "alive" in taken
    assert len(taken) == 5
    queue.done(taken[0], 1.0, 1.9, responded=False)  # then the next hanging host gets its turn
    assert len(sent(queue, 2.0)) == 1


def test_a_host_that_begins_to_hang_leaves_workers_to_the_others() -> None:
    queue = BeatQueue(8)
    for host in ("a", "b"):
        queue.put(host, host)
        queue.take(0.0)
        queue.done(host, 0.0, 0.05, responded=True)
    for number in range(20):
        queue.put("a", f"a{number}")
    assert len(sent(queue, 1.0)) == 6
    queue.put("b", "b0")
    assert sent(queue, 1.0) == ["b0"]


def test_a_host_whose_response_is_overdue_gets_no_further_worker() -> None:
    queue = BeatQueue(8)
    for host in ("a", "b"):
        queue.put(host, host)
        queue.take(0.0)
        queue.done(host, 0.0, 0.05, responded=True)
    queue.put("a", "a0")
    assert sent(queue, 1.0) == ["a0"]
    queue.put("a", "a1")
    assert sent(queue, 1.0 + OVERDUE_S / 2) == ["a1"]  # not yet
    queue.put("a", "a2")
    assert sent(queue, 1.01 + OVERDUE_S) == []
    queue.put("b", "b0")
    assert sent(queue, 1.01 + OVERDUE_S) == ["b0"]


def test_a_host_that_is_always_slow_is_not_overdue() -> None:
    queue = BeatQueue(8)
    for host in ("far", "near"):
        queue.put(host, host)
        queue.take(0.0)
        queue.done(host, 0.0, 0.4 if host == "far" else 0.05, responded=True)
    queue.put("far", "a0")
    assert sent(queue, 1.0) == ["a0"]
    for number in range(1, 20):
        queue.put("far", f"a{number}")
    assert len(sent(queue, 1.5)) == 5


def test_a_forgotten_host_leaves_nothing_behind() -> None:
    queue = BeatQueue(8)
    queue.put("a", "a0")
    queue.take(0.0)
    queue.forget("a")  # no effect while its beat is in flight ...
    queue.done("a", 0.0, 0.9, responded=False)
    queue.forget("a")  # ... but afterwards
    queue.put("a", "a1")
    queue.put("a", "a2")
    assert sent(queue) == ["a1", "a2"]  # it starts with a clean slate
