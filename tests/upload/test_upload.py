"""The stream protocol, on a device that runs queued work as late and in as odd an order as it may. See simulated.py.

That these tests see faults is itself tested: the Upload class is broken in every possible way, and each time some
schedule must show it.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
import re
from dataclasses import replace

import pytest
import torch
from mutants import Without, class_from, first_fault, orders
from simulated_feed import DATA_SETS, data
from simulated_run import Config, Simulation, run

import nanopack.upload.upload
from nanopack.errors import ConversationError
from nanopack.upload.upload import Upload

SOURCE = inspect.getsource(nanopack.upload.upload)
SCHEDULES = 20
CONFIGS = [
    Config(slots, staging, static, overlap_copy)
    for slots, staging, static, overlap_copy in itertools.product((3, 4, 5, 6), (1, 2), (False, True), (True, False))
]


def id_of(config: Config) -> str:
    sizes = f"{config.slots} slots, {config.staging} staging"
    return sizes + ", static" * config.static + ", one stream" * (not config.overlap_copy)


@pytest.mark.parametrize("config", CONFIGS, ids=id_of)
def test_every_schedule_gives_the_references_batches_in_order(config):
    for seed in range(SCHEDULES):
        run(replace(config, switch=bool(seed % 2)), seed)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=id_of)
def test_ten_thousand_more_schedules_do_so_too(config):
    for seed in range(SCHEDULES, SCHEDULES + 10_000):
        run(replace(config, switch=bool(seed % 2)), seed)


@pytest.mark.parametrize("prefetch", range(1, 9))
def test_any_prefetch_and_number_of_slots_will_do(prefetch):
    for slots, seed in itertools.product((1, 2, prefetch + 2), range(15)):
        run(Config(slots, static=seed % 3 == 0, overlap_copy=seed % 5 > 1, prefetch=prefetch), seed)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_producer_in_the_callers_thread_will_do(slots):
    for seed in range(150):
        run(Config(slots, static=seed % 3 == 0, overlap_copy=seed % 5 > 1, inline=True), seed)


@pytest.mark.parametrize("static", [False, True], ids=["fresh", "static"])
def test_the_real_kernel_gives_the_references_batches(static):
    for seed in range(10):
        run(Config(static=static, executor="triton"), seed)


@pytest.mark.parametrize("batches", range(9))
def test_a_run_may_be_closed_after_any_batch(batches):
    for seed in range(50):
        run(Config(3, static=seed % 3 == 0, overlap_copy=seed % 5 > 1), seed, batches=batches)


def test_batches_that_are_ready_come_before_the_failure_after_them():
    for seed in range(DATA_SETS):
        simulation = Simulation(Config(slots=12, prefetch=12), seed, data_set=seed)
        while simulation.feed.step():
            pass
        assert simulation.train(99)
        assert simulation.trainer.seen == len(simulation.data.batches)
        for _ in range(2):
            with pytest.raises(ConversationError if seed % 4 == 3 else StopIteration):
                next(simulation.loader)
        simulation.close()


def test_a_batch_is_refused_inside_a_capture_and_nothing_is_queued_or_lost():
    for seed in range(DATA_SETS):
        simulation = Simulation(Config(), seed)
        device = simulation.device
        for batches in range(len(simulation.data.batches) + 1):
            device.is_capturing, calls = True, device.calls
            with pytest.raises(RuntimeError, match="inside a CUDA graph capture"):
                next(simulation.loader)
            assert device.calls == calls
            device.is_capturing = False
            simulation.train(batches + 1)
        simulation.close()


def test_want_of_memory_costs_no_batch():
    for seed in range(DATA_SETS):
        simulation = Simulation(Config(), seed)
        for batches in range(len(simulation.data.batches)):
            simulation.memory_is_short = 1.0
            for _ in range(2):
                with pytest.raises(torch.OutOfMemoryError):
                    next(simulation.loader)
            simulation.memory_is_short = 0.0
            assert not simulation.train(batches + 1)
        simulation.close()


@pytest.mark.parametrize("config", [Config(), Config(static=True), Config(overlap_copy=False)], ids=id_of)
def test_an_interrupt_anywhere_leaves_nothing_that_close_does_not_wait_for(config):
    interrupts = 0
    for seed in range(300):
        simulation = Simulation(config, seed)
        device = simulation.device
        if simulation.train(simulation.random.randrange(len(simulation.data.batches) + 1)):
            continue
        device.interrupt_at = device.calls + simulation.random.randrange(1, 12)
        try:
            with contextlib.suppress(StopIteration, ConversationError):
                next(simulation.loader)
        except KeyboardInterrupt:
            interrupts += 1
        device.interrupt_at = None
        simulation.close()
    assert interrupts > 150


def test_static_outputs_are_always_the_same_memory():
    simulation = Simulation(Config(static=True), seed=0)
    addresses = {batch.inputs.data_ptr() for batch in simulation.loader}
    assert len(simulation.data.batches) > 1 and len(addresses) == 1


def simulation_with_ready_batches(config: Config, seed: int) -> Simulation:
    simulation = Simulation(config, seed, data_set=0)
    while simulation.feed.step():
        pass
    simulation.feed.lag = 0
    simulation.device.drain()
    simulation.device.stand_still()
    return simulation


@pytest.mark.parametrize("config", [Config(), Config(static=True), Config(overlap_copy=False)], ids=id_of)
def test_the_host_never_waits_for_a_device_that_keeps_up(config):
    simulation = simulation_with_ready_batches(config, seed=0)
    for _ in simulation.loader:
        simulation.device.drain()
    assert simulation.device.waits == 0


def test_the_next_batch_is_copied_while_the_callers_stream_is_busy():
    simulation = simulation_with_ready_batches(Config(), seed=0)
    next(simulation.loader)
    simulation.device.run_others()
    # the third copy waits for the kernel of the first batch, whose staging buffer it gets
    assert simulation.device.copied == 2


def test_the_data_sets_reach_every_way_of_ending():
    sets = [data(number) for number in range(DATA_SETS)]
    assert {chosen.ends_with for chosen in sets} == {StopIteration, ConversationError}
    assert max(len(chosen.batches) for chosen in sets) > 6


# Mutants: the Upload class with a line changed. The clocks must see each, and on some schedule the data must be wrong.

COMMON = [
    Config(3, staging, static, overlap_copy)
    for staging, static, overlap_copy in itertools.product((1, 2), (False, True), (True, False))
]
COPY = "device.copy(self._staging[staged][:used_bytes], self._slots[slot][:used_bytes], stream)"
COPIED = "device.record(self._copied[slot], stream)"
LAUNCH = "device.launch(self._kernel, self._staging[staged], outputs, stream)"
PACKED = "device.record(self._packed[staged], stream)"
DELIVERS = "self._last_stream = stream\n        "
NEXT_LINE = "{}\n        {}".format

MUTANTS = {
    "E0, D is made before it is copied into": ("device.record(event, self._last_stream)", "pass"),
    "E2, D is read before it is copied into": (
        PACKED,
        "self._packed.append(device.new_event()); device.record(self._packed[-1], stream)",
    ),
    "E3, D is copied into before it is read": ("device.wait(stream, self._copied[slot])", "pass"),
    "E4, H is copied before it is filled": ("self._device.query(self._copied[self._in_use[0]])", "True"),
    "E5, static outputs are read before they are written": ("device.wait(stream, self._switch)", "pass"),
    "E7, all ends before close": ("self._device.synchronize(self._switch)", "pass"),
    "E7, streams that copied end before close": (
        "self._streams.add(stream)\n        device.wait(stream, self._p",
        "device.wait(stream, self._p",
    ),
    "E7, streams that packed end before close": (DELIVERS + "self._streams.add(stream)", DELIVERS + "pass"),
    "copied is recorded before the copy": (NEXT_LINE(COPY, COPIED), NEXT_LINE(COPIED, COPY)),
    "copied is recorded again before H is free": (
        "[device.new_event() for _ in slots]",
        "[device.new_event()] * len(slots)",
    ),
    "copied is recorded on the caller's stream": (COPIED, "device.record(self._copied[slot], device.current_stream())"),
    "packed is recorded before the kernel": (NEXT_LINE(LAUNCH, PACKED), NEXT_LINE(PACKED, LAUNCH)),
    "packed is recorded for another D": (PACKED, "device.record(self._packed[staged - 1], stream)"),
    "packed is recorded on the copy stream": (PACKED, "device.record(self._packed[staged], self._copies or stream)"),
    "D is idle before its kernel is queued": (
        "self._submitted.append((slot, staged))",
        "self._submitted.append((slot, staged)); self._idle.append(staged)",
    ),
    "the last stream is forgotten": (DELIVERS, ""),
}


def fault_of(kind: str, upload: type[Upload] = Upload, schedules: int = 3000, **options: bool) -> str | None:
    return first_fault(kind, lambda seed: run(COMMON[seed % len(COMMON)], seed, upload, **options), schedules)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_clocks_see_a_broken_edge(name):
    old, new = MUTANTS[name]
    assert SOURCE.count(old) == 1, f"upload.py has changed, and this mutant has to follow: {old}"
    assert fault_of("not ordered", class_from(SOURCE.replace(old, new), "Upload")) is not None


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_edge_gives_wrong_data_on_some_schedule(name):
    old, new = MUTANTS[name]
    assert fault_of("", class_from(SOURCE.replace(old, new), "Upload"), clocks=False) is not None


@pytest.mark.parametrize("kind, clocks", [("not ordered", True), ("wrong data", False)])
def test_news_that_come_before_the_slot_is_filled_are_seen(kind, clocks):
    assert fault_of(kind, hasty=True, clocks=clocks) is not None


ORDERS = [ast.unparse(call) for call in orders(ast.parse(SOURCE), "Upload")]


@pytest.mark.parametrize("number", range(len(ORDERS)), ids=ORDERS)
def test_no_line_that_orders_is_there_in_vain(number):
    tree = ast.parse(SOURCE)
    call = orders(tree, "Upload")[number]
    # without its synchronize, reclaim() returns nothing, and the loader waits for a producer that has no slot
    kind = "deadlock" if ORDERS[number] == "self._device.synchronize(self._copied[self._in_use[0]])" else "not ordered"
    assert fault_of(kind, class_from(Without(call).visit(tree), "Upload")) is not None


def test_the_mutants_differ_from_upload_in_nothing_else():
    [source] = re.findall(r"^class Upload:.*", SOURCE, re.DOTALL | re.MULTILINE)
    assert len(ORDERS) == len(re.findall(r"evice\.(?:wait|record|synchronize|query)\(", source))
    assert fault_of("", class_from(SOURCE, "Upload"), schedules=500) is None
