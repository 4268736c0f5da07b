"""The clock of the benches on a card, with events that are made up: no time is lost or added."""

import types

import pytest
import torch

from bench import clock


class Card:
    """A stream that does its work when somebody waits for it; launches are free."""

    def __init__(self, monkeypatch):
        self.done, self.queued, self.waits, self.zeroed = 0.0, 0.0, 0, 0
        card = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                self.at = card.done + card.queued

            def synchronize(self):
                card.waits += 1
                card.finish()

            def elapsed_time(self, other):
                assert card.done >= other.at, "read before the stream was there"
                return 1e3 * (other.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", self.finish)
        monkeypatch.setattr(clock, "DEVICE", "cuda")
        events = clock.EventClock()
        events.__dict__["_emptying"] = types.SimpleNamespace(zero_=self.empty)
        monkeypatch.setattr(clock, "_events", events)

    def finish(self):
        self.done, self.queued = self.done + self.queued, 0.0

    def launch(self, seconds):
        self.queued += seconds

    def empty(self):
        self.zeroed += 1
        self.launch(7.0)


@pytest.fixture
def card(monkeypatch):
    return Card(monkeypatch)


def test_emptying_the_cache_is_not_timed_and_nothing_waits_before_the_call(card):
    for _ in range(3):
        clock._events.cold()
        before = card.waits
        begin = clock.timer()
        card.launch(0.25)
        assert card.waits == before
        assert clock.timer() - begin == pytest.approx(0.25, abs=1e-12)
    assert card.zeroed == 3


def test_without_a_cold_cache_it_is_a_plain_clock(card):
    clock.timer()
    for seconds in (0.5, 0.125):
        begin = clock.timer()
        card.launch(seconds)
        assert clock.timer() - begin == pytest.approx(seconds, abs=1e-12)


def test_every_round_on_a_card_begins_with_a_cold_cache(card):
    """As pytest-benchmark's pedantic mode plays it: set up, read, call, read."""
    found = []

    def pedantic(run, setup, rounds):
        for _ in range(rounds):
            setup()
            begin = clock.timer()
            result = run()
            found.append(clock.timer() - begin)
        return result

    benchmark = types.SimpleNamespace(pedantic=pedantic, extra_info={})
    clock._timed(benchmark, lambda: card.launch(0.5), rounds=1)
    assert len(found) >= 3
    assert found == pytest.approx([0.5] * len(found))
    assert card.zeroed == len(found)
    assert benchmark.extra_info == {"clock": "CUDA events, cold L2"}


def test_ceilings_are_of_bursts(card):
    took = clock._best(lambda: card.launch(0.001), 0.01, "cuda")
    assert took == pytest.approx(0.001)
    assert clock._best(lambda: None, 0.01, "cpu") < 0.01


def test_on_the_cpu_nothing_changes(monkeypatch):
    monkeypatch.setattr(clock, "DEVICE", "cpu")
    asked = []
    benchmark = types.SimpleNamespace(pedantic=lambda run, rounds: asked.append(rounds))
    clock._timed(benchmark, list, rounds=3)
    assert asked == [3]
    assert 0 <= clock.timer() - clock.timer() + 1 <= 1
