"""Which instance a session belongs to, until when, and where a new one goes."""

from __future__ import annotations

import asyncio

import pytest

from deploy.local_endpoint.pins import GoneError, Instance, SessionPins


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_pins(count: int = 2) -> tuple[SessionPins, list[Instance], Clock]:
    clock = Clock()
    instances = [Instance(number, f"http://{number}", "log") for number in range(1, count + 1)]
    return SessionPins(instances, clock), instances, clock


def test_a_new_session_goes_where_the_fewest_are_open():
    pins, (first, second), _ = make_pins()
    for name in "abc":
        pins.pin(name, first, 2000)
    assert pins.place() is second
    pins.pin("d", second, 2000)
    assert pins.place() is second
    for name in "abc":
        pins.drop(name)
    assert pins.place() is first


def test_equal_instances_take_turns():
    pins, _, _ = make_pins(3)
    assert [pins.place().number for _ in range(6)] == [1, 2, 3, 1, 2, 3]


def test_what_is_being_opened_counts():
    pins, (first, second), _ = make_pins()
    with pins.opening(first), pins.opening(first):
        assert pins.place() is second
        assert pins.place() is second
    assert pins.place() is first


def test_a_pin_ends_at_its_expiry():
    pins, (first, second), clock = make_pins()
    pins.pin("a", first, 1010)
    pins.pin("b", second, 1020)
    clock.now = 1009.9
    assert pins.find("a") is first
    clock.now = 1010
    assert pins.find("a") is None
    assert pins.find("b") is second
    assert pins.open_sessions() == {1: 0, 2: 1}
    clock.now = 1020
    assert pins.open_sessions() == {1: 0, 2: 0}


def test_nothing_is_placed_on_an_instance_that_is_gone():
    pins, (first, second), _ = make_pins()
    pins.pin("a", second, 2000)
    first.gone = True
    assert pins.place() is second
    second.gone = True
    assert pins.place() is None
    assert pins.find("a") is second, "the pin stays: what its session is told is a corner of the contract"


def test_a_moved_session_keeps_its_expiry():
    pins, (first, second), clock = make_pins()
    pins.pin("a", first, 1010)
    pins.move("a", second)
    assert pins.find("a") is second
    clock.now = 1010
    assert pins.find("a") is None


def test_whoever_waits_for_an_instance_hears_of_its_loss_at_once_and_so_does_who_comes_later():
    async def wait(instance: Instance, seconds: float) -> None:
        async with asyncio.timeout(seconds), instance.waiting():
            await asyncio.Event().wait()

    async def lose_one() -> None:
        lost, other = make_pins()[1]
        waiting = [asyncio.create_task(wait(lost, 60)) for _ in range(3)]
        elsewhere = asyncio.create_task(wait(other, 0.2))
        await asyncio.sleep(0)
        lost.lose()
        for ended in asyncio.as_completed(waiting, timeout=10):
            with pytest.raises(GoneError):
                await ended
        with pytest.raises(GoneError):
            await wait(lost, 60)
        with pytest.raises(TimeoutError):
            await elsewhere

    asyncio.run(lose_one())
