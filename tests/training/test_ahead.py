"""Values that are there before they are asked for."""

import threading
import time

import pytest

from nestdiff_core.training.ahead import Ahead

SECONDS = 20  # within which a thread does anything


def square(i: int) -> int:
    return i * i


@pytest.mark.parametrize("asked", [range(6), range(3, 9), [5, 5, 0, 7, 2, 1]])
def test_it_is_the_function_it_was_made_from(asked: list[int]) -> None:
    """From any beginning and in any order, and again after `close`; closed, it leaves no thread."""
    before = threading.active_count()
    with Ahead(square) as squares:
        assert [squares(i) for i in asked] == [square(i) for i in asked]
        squares.close()
        assert threading.active_count() == before
        assert squares(4) == 16
    assert threading.active_count() == before


def test_no_more_are_made_than_are_needed_soon() -> None:
    """While one is used `depth` others are made, none twice, none from `end` on."""
    made: list[int] = []
    last_is_made = threading.Event()

    def make(i: int) -> int:
        made.append(i)
        if i == expected:
            last_is_made.set()
        return i

    with Ahead(make, end=9, depth=3) as values:
        for i in range(4, 9):
            expected = min(i + 3, 8)
            assert values(i) == i
            assert last_is_made.wait(SECONDS)
            assert made == list(range(4, expected + 1))
            if expected < 8:
                last_is_made.clear()


def test_values_are_let_go() -> None:
    """No more values live than the one in use, and `depth` to come."""
    alive = 0
    most = 0

    class Value:
        def __init__(self) -> None:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    with Ahead(lambda _: Value(), depth=2) as values:
        for i in range(50):
            values(i)
    assert most <= 3 and alive == 0


def test_an_error_comes_with_its_value() -> None:
    """As itself, after the values before it, and the thread ends."""

    def make(i: int) -> int:
        if i == 2:
            raise ZeroDivisionError("value 2")
        return i

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError, match="value 2"), Ahead(make) as values:
        assert [values(0), values(1)] == [0, 1]
        values(2)
    assert threading.active_count() == before


def test_an_interrupt_ends_the_thread() -> None:
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), Ahead(square) as squares:
        squares(0)
        raise KeyboardInterrupt
    assert threading.active_count() == before


def test_waiting_is_counted() -> None:
    """A slow maker is waited for; one that keeps up is not."""
    with Ahead(lambda _: time.sleep(0.05)) as values:
        for i in range(4):
            values(i)
        assert values.waited > 0.15
    released = threading.Event()
    with Ahead(lambda i: released.set() if i == 1 else None, depth=1) as values:
        values(0)
        assert released.wait(SECONDS)
        time.sleep(0.05)
        first = values.waited
        values(1)
        assert values.waited - first < 0.05
