"""Inbox: order, bounded waits, and puts by finalizers."""

from __future__ import annotations

import contextlib
import gc
import queue
import sys
import threading
import time
import weakref
from typing import List

import pytest
from support.threads import race

from tinkex._runtime.inbox import Inbox


def test_items_are_delivered_in_order() -> None:
    inbox: Inbox[int] = Inbox()
    for item in range(3):
        inbox.put(item)
    assert inbox.qsize() == 3
    assert [inbox.get(), inbox.get(0.0), inbox.get_nowait()] == [0, 1, 2]
    assert inbox.empty()
    with pytest.raises(queue.Empty):
        inbox.get_nowait()


@pytest.mark.parametrize("timeout", [0.0, 1e-9, 1e-7, 3e-7, 1e-6])
@pytest.mark.parametrize("was_used", [False, True])
def test_even_the_shortest_wait_ends(timeout: float, was_used: bool) -> None:
    for _ in range(2000):
        inbox: Inbox[int] = Inbox()
        if was_used:
            inbox.put(1)
            inbox.get()
        with pytest.raises(queue.Empty):
            inbox.get(timeout=timeout)


def test_a_wait_is_as_long_as_requested() -> None:
    inbox: Inbox[int] = Inbox()
    inbox.put(1)
    inbox.get()
    began = time.monotonic()
    with pytest.raises(queue.Empty):
        inbox.get(timeout=0.05)
    assert time.monotonic() - began >= 0.05


@pytest.mark.parametrize("timeout", [None, 60.0, 1e15])
def test_a_put_ends_the_wait(timeout: float) -> None:
    inbox: Inbox[int] = Inbox()
    threading.Timer(0.02, inbox.put, [7]).start()
    assert inbox.get(timeout) == 7


def test_every_item_is_taken_once_by_waiting_threads() -> None:
    inbox: Inbox[int] = Inbox()
    taken: List[int] = []
    count, threads = 400, 4
    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:

        def work() -> None:
            for item in range(count):
                inbox.put(item)
                taken.append(inbox.get(60))

        race(*[work] * threads)
    finally:
        sys.setswitchinterval(switch_s)
    assert sorted(taken) == sorted(list(range(count)) * threads)
    assert inbox.empty()


def test_two_simultaneous_items_wake_two_threads() -> None:
    inbox: Inbox[int] = Inbox()
    released = threading.Event()
    taken = [threading.Event(), threading.Event()]

    def work() -> None:
        taken[inbox.get()].set()
        released.wait(60)

    threads = [threading.Thread(target=work) for _ in taken]
    for thread in threads:
        thread.start()
    inbox.put(0)
    inbox.put(1)
    assert all(event.wait(60) for event in taken)
    released.set()
    for thread in threads:
        thread.join()


class Owner:
    pass


def test_a_finalizer_may_put_an_item_during_any_call() -> None:
    inbox: Inbox[int] = Inbox()
    taken: List[int] = []
    count = 2000
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for item in range(count):
            owner = Owner()
            owner.itself = owner  # type: ignore[attr-defined] # only the collector frees it
            weakref.finalize(owner, inbox.put, item)
            del owner
            with contextlib.suppress(queue.Empty):
                taken.append(inbox.get(0.0))
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    while not inbox.empty():
        taken.append(inbox.get())
    assert sorted(taken) == list(range(count))
