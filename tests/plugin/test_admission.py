"""Who is let into the engine, in which order, and when nobody is taken any more. No server, no clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from mistral_node.admission import QUEUE, WAITING_BYTES, Admission, Full
from mistral_node.bodies import Bounds

EIGHT = Bounds(4096, 8)  # 10 places, 6 for one key of several


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())

    run.__name__ = test.__name__
    return run


def let_in(places: list[Any]) -> list[bool]:
    return [place.let_in.done() for place in places]


@in_a_loop
async def test_a_key_that_is_the_only_one_may_have_every_place() -> None:
    queue = Admission(EIGHT, lambda: False)
    places = [queue.enter("a", 1, 0) for _ in range(12)]
    assert let_in(places) == [True] * 10 + [False] * 2
    queue.leave(places[0])
    assert let_in(places[10:]) == [True, False]


@in_a_loop
async def test_one_key_of_several_leaves_places_to_the_others() -> None:
    queue = Admission(EIGHT, lambda: True)
    places = [queue.enter("a", 1, 0) for _ in range(12)]
    assert let_in(places) == [True] * 6 + [False] * 6
    assert queue.enter("b", 1, 0).let_in.done()


@in_a_loop
async def test_sequences_count_and_not_requests() -> None:
    queue = Admission(EIGHT, lambda: True)
    whole, next_one, other = queue.enter("a", 6, 0), queue.enter("a", 1, 0), queue.enter("b", 4, 0)
    assert let_in([whole, next_one, other]) == [True, False, True]
    queue.leave(whole)
    assert let_in([next_one]) == [True]


@in_a_loop
async def test_who_has_least_in_the_engine_comes_first_and_a_key_keeps_its_order() -> None:
    queue = Admission(EIGHT, lambda: True)
    first = [queue.enter("a", 6, 0), queue.enter("b", 4, 0)]
    waiting = [queue.enter("b", 1, 0), queue.enter("b", 1, 0), queue.enter("c", 1, 0)]
    queue.leave(first[1])
    assert let_in(waiting) == [True, True, True]
    more = [queue.enter("b", 4, 0), queue.enter("b", 1, 0), queue.enter("c", 1, 0)]
    assert let_in(more) == [False, False, True]  # b's second one would fit, and does not pass its first
    queue.leave(waiting[0])
    queue.leave(waiting[1])
    queue.leave(waiting[2])
    queue.leave(more[2])
    assert let_in(more) == [True, False, True]


@in_a_loop
async def test_the_queue_ends_and_one_key_of_several_does_not_fill_it() -> None:
    queue = Admission(EIGHT, lambda: True)
    for _ in range(6 + QUEUE * 8 * 3 // 4):
        queue.enter("a", 1, 0)
    with pytest.raises(Full):
        queue.enter("a", 1, 0)
    assert queue.enter("b", 1, 0).let_in.done()
    alone = Admission(EIGHT, lambda: False)
    for _ in range(10 + QUEUE * 8):
        alone.enter("a", 1, 0)
    with pytest.raises(Full):
        alone.enter("a", 1, 0)


@in_a_loop
async def test_what_waits_is_bounded_in_bytes() -> None:
    queue = Admission(EIGHT, lambda: False)
    held = [queue.enter("a", 6, 0), queue.enter("a", 4, 0), queue.enter("a", 1, WAITING_BYTES)]
    with pytest.raises(Full):
        queue.enter("a", 1, 1)
    queue.leave(held[2])
    assert not queue.enter("a", 1, 1).let_in.done()


@in_a_loop
async def test_who_goes_while_waiting_frees_nothing_else() -> None:
    queue = Admission(Bounds(4096, 1), lambda: False)
    running = [queue.enter("a", 1, 0), queue.enter("a", 1, 0)]
    gone, next_one = queue.enter("a", 1, 0), queue.enter("a", 1, 0)
    queue.leave(gone)
    assert not next_one.let_in.done()
    queue.leave(running[0])
    assert next_one.let_in.done()
