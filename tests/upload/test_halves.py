"""The protocol of graph batches, on a device that runs queued work as late and in as odd an order as it may.

As test_upload.py, and with the same test of the tests: Halves with a line taken away must fail on some schedule.
"""

from __future__ import annotations

import ast
import inspect
import re

import pytest
from mutants import Without, class_from, first_fault, orders
from simulated_halves import BATCHES, Simulation, run

import nanopack.upload.halves
from nanopack.upload.halves import Halves

SOURCE = inspect.getsource(nanopack.upload.halves)


def test_every_schedule_loads_the_batches_in_order():
    for seed in range(1500):
        run(seed)


@pytest.mark.slow
def test_ten_thousand_more_schedules_do_so_too():
    for seed in range(1500, 11_500):
        run(seed)


def test_a_load_that_was_not_counted_is_an_error_at_the_refill_after_the_next():
    found = 0
    for seed in range(200):
        simulation = Simulation(seed)
        if simulation.count < 1:
            continue
        try:
            simulation.train(99, lies=1)
        except RuntimeError as error:
            assert "the device counted" in str(error)
            found += 1
            # those after it may be padding, but nothing else is read
            simulation.halves.close()
    assert found > 50


def test_more_loads_than_batches_are_refused():
    simulation = Simulation(seed=1)
    ready = simulation.refills.refill()
    with pytest.raises(ValueError, match=f"loaded={len(ready) + 1} is not allowed"):
        simulation.refills.count(len(ready) + 1)
    assert simulation.refills.ready == ready


def test_a_load_too_many_is_a_batch_of_padding():
    simulation = Simulation(seed=1)
    simulation.refills.refill()
    for _ in range(BATCHES + 2):
        simulation.halves.load()
    simulation.device.drain()
    # its table is the padding of one row, and its facts are none
    assert simulation.outputs.inputs.tolist() == [0, BATCHES + 1, 0, 0, 0, 9]


def test_the_host_waits_only_for_loads_of_the_half_before():
    simulation = Simulation(seed=3)
    simulation.count = 3 * BATCHES
    device, refills = simulation.device, simulation.refills
    device.stand_still()
    ready = refills.refill()
    device.drain()
    for facts in ready:
        simulation.load(facts)
    # none of these loads has run, and the other half is filled all the same
    refills.count(len(ready))
    assert refills.refill() and device.current.queue


# Mutants: the Halves class with a line changed. The clocks must see each, and on some schedule the data must be wrong.

SEEN = "device.copy(self._seen[self.current], self._counter[:8], stream)"
LEFT = "device.record(self._left[self.current], stream)"
COPY = "device.copy(self._halves[other][:used_bytes], self._staged[other][:used_bytes], self._copies)"
COPIED = "device.record(self._copied[other], self._copies)"
NEXT_LINE = "{}\n        {}".format

MUTANTS = {
    "G1, D and C are made before they are copied into": ("device.record(event, self._last_stream)", "pass"),
    "G2, D is read before it is copied into": ("self._device.synchronize(self._left[half])", "pass"),
    "G3, D is copied into before the counter points there": ("device.wait(stream, self._copied[other])", "pass"),
    "G5, loads come before the counter is read on another stream": ("device.wait(stream, self._switch)", "pass"),
    "G7, all ends before close": ("self._device.synchronize(self._switch)", "pass"),
    "left is recorded before the counter is copied": (
        NEXT_LINE(SEEN, LEFT),
        NEXT_LINE(LEFT, SEEN),
    ),
    "copied is recorded before the copy": (NEXT_LINE(COPY, COPIED), NEXT_LINE(COPIED, COPY)),
    "the counter points on the stream of copies": (
        "self._halves[other][:COUNTER_BYTES], stream)",
        "self._halves[other][:COUNTER_BYTES], self._copies)",
    ),
    "the last stream is forgotten": ("self._last_stream = stream\n\n    def leave", "\n    def leave"),
}


def fault_of(kind: str, halves: type[Halves], schedules: int = 3000, **options: bool) -> str | None:
    return first_fault(kind, lambda seed: run(seed, halves, **options), schedules)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_clocks_see_a_broken_edge(name):
    old, new = MUTANTS[name]
    assert SOURCE.count(old) == 1, f"halves.py has changed, and this mutant has to follow: {old}"
    assert fault_of("not ordered", class_from(SOURCE.replace(old, new), "Halves")) is not None


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_edge_gives_wrong_data_on_some_schedule(name):
    old, new = MUTANTS[name]
    assert fault_of("", class_from(SOURCE.replace(old, new), "Halves"), clocks=False) is not None


ORDERS = [ast.unparse(call) for call in orders(ast.parse(SOURCE), "Halves")]


@pytest.mark.parametrize("number", range(len(ORDERS)), ids=ORDERS)
def test_no_line_that_orders_is_there_in_vain(number):
    tree = ast.parse(SOURCE)
    call = orders(tree, "Halves")[number]
    assert fault_of("not ordered", class_from(Without(call).visit(tree), "Halves")) is not None


def test_the_mutants_differ_from_halves_in_nothing_else():
    [source] = re.findall(r"^class Halves:.*", SOURCE, re.DOTALL | re.MULTILINE)
    assert len(ORDERS) == len(re.findall(r"evice\.(?:wait|record|synchronize|query)\(", source))
    assert fault_of("", class_from(SOURCE, "Halves"), schedules=500) is None
