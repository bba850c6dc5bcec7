"""In real process groups: a killed run resumes bit for bit, on any number of ranks, and no rank waits forever."""

from __future__ import annotations

import itertools
import os
import random
import sys

import pytest
import torch
from distributed_ranks import (
    CHATS,
    MIXED,
    Ranks,
    counted_with_a_bad_conversation_of_rank_1,
    dates_of_a_loader,
    default_shard,
    gathered_state,
    load_and_go_on,
    logged_in_an_endless_run,
    logged_without_a_fitting_group,
    refused,
    rows_of,
    save_and_continue,
    steps_in_common,
    wrong_groups,
)
from distributed_run import BYTES, SAVE_EVERY, STEPS
from launched import Run, kill, until
from torch.distributed.checkpoint.stateful import Stateful

from nanopack import Loader, merge_states
from nanopack.packing import Stream

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
# As in hypothesis, CI takes the same road each time.
SEED = 0 if "CI" in os.environ else random.randrange(10_000)


@pytest.mark.parametrize("then", [[1], pytest.param([1, 4], marks=pytest.mark.slow)], ids=["2 to 1", "2 to 1 to 4"])
def test_killed_and_resumed_on_other_numbers_of_ranks_losses_and_weights_are_those_of_the_uninterrupted_run(
    tmp_path, then
):
    moments = random.Random(SEED)
    kills = list(itertools.accumulate(moments.randint(2 * SAVE_EVERY, 14) for _ in range(1 + len(then))))
    print(f"SEED = {SEED}: kills at steps {kills}")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    with Run(tmp_path / "whole") as run:
        assert run.first.wait(200) == 0, run.log.read_text()
        whole = run.lines()
    folder = tmp_path / "killed"
    with Run(folder, world_size=2, restarts=1) as run:
        run.wait_for_step(kills[0])
        before = run.processes() - {run.first.pid}
        assert len(before) == 4, "two ranks and the producer of each"
        kill(moments.choice(run.ranks(2)))
        # torchrun ends the other rank, and starts both again
        until(60, lambda: not before & run.processes())
        run.wait_for_step(kills[1])
        for pid in (run.first.pid, *run.ranks(2)):
            kill(pid)
        until(60, lambda: not run.processes())
    for step in kills[2:]:
        with Run(folder) as run:
            run.wait_for_step(step)
            kill(run.first.pid)
            until(60, lambda: not run.processes())
    with Run(folder, world_size=None if then == [1] else then[-1]) as run:
        assert run.first.wait(200) == 0, run.log.read_text()
        until(60, lambda: not run.processes())
        lines = run.lines()
    starts = [line.split() for line in lines if line.startswith("from")]
    assert [int(world_size) for *_, world_size in starts] == [2, 2, *then]
    for killed_at, (_, start, *_) in zip(kills, starts[1:], strict=True):
        assert killed_at - SAVE_EVERY < int(start), "it resumes from the last checkpoint before the kill"
    losses = [line for line in lines if not line.startswith("from")]
    assert set(losses) == set(whole[1:]) and len(whole[1:]) == STEPS
    expected, got = torch.load(tmp_path / "whole" / "weights"), torch.load(folder / "weights")
    for name, weights in expected.items():
        assert torch.equal(weights, got[name]), name


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.mark.parametrize("shard", ["rank", "row"])
def test_rank_and_world_size_are_those_of_torch_distributed(ranks, shard):
    answers = ranks(3, default_shard, shard=shard)
    assert all(same for _, same in answers)
    assert answers[0][0] != answers[1][0] != answers[2][0]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("grouping", ["passed", "default", "none"])
@pytest.mark.parametrize("shard", ["rank", "row"])
def test_ranks_of_uneven_data_end_together(ranks, shard, grouping, workers):
    answers = ranks(4 if grouping == "none" else 3, steps_in_common, grouping, shard=shard, num_workers=workers)[:3]
    steps, length, filled = map(set, zip(*answers, strict=True))
    assert steps == length == {max(filled)} and min(filled) < max(filled) / 5


def test_all_ranks_write_the_date_of_the_first(ranks):
    pytest.importorskip("transformers", reason="needs transformers: pip install 'nanopack-gpu[hf]'")
    assert ranks(2, dates_of_a_loader) == [("2025-12-10", "10"), ("2025-12-11", "10")]


def test_a_group_that_is_not_that_of_all_ranks_is_refused(ranks):
    for rank, said in enumerate(ranks(3, wrong_groups)):
        other, pair, endless = said
        assert "process_group has 3 ranks, but world_size=2" in other
        assert ("process_group has 2 ranks, but world_size=3" if rank < 2 else "process_group") in pair
        assert "process_group has no meaning without epochs" in endless


def test_a_loader_of_other_ranks_than_the_default_group_s_does_not_wait_for_them_and_says_so(ranks):
    # each process stands for rank 0, of two or of one: none of them could meet the others
    for lines, counted in ranks(3, logged_without_a_fitting_group, 2):
        assert not counted and ["has 3 ranks, but world_size=2" in line for line in lines] == [True]
    assert ranks(3, logged_without_a_fitting_group, 1) == [([], False)] * 3


def test_a_rank_that_cannot_count_says_so_and_the_others_do_not_wait_for_it(ranks):
    first, second, third = ranks(3, counted_with_a_bad_conversation_of_rank_1)
    assert second[0] == "ConversationError" and "conversation 4" in second[1]
    assert first == third == ("RuntimeError", "another rank could not count its batches; its own error says why")


OTHER = {
    "files divided by rank": ("conversations", {"conversations": [CHATS[::2], CHATS[1::2]]}),
    "an order of its own": ("conversations", {"conversations": [CHATS, CHATS[::-1]]}),
    "a seed of its own": ("seed", {"seed": [1, 2]}),
    "other epochs": ("epochs", {"epochs": [1, 2]}),
    "another tokenizer": ("tokenizer", {"tokenizer": [BYTES, "chat32k"]}),
    "other rows": ("batch_size", {"batch_size": [2, 3], "shard": ["row", "row"]}),
    "batches of another size, of its own shard": (None, {"batch_size": [2, 3]}),
    "skipping": (None, {"on_error": ["raise", "skip"]}),
}


@pytest.mark.parametrize("case", OTHER)
def test_ranks_that_would_not_divide_the_same_data_are_refused(ranks, case):
    what, arguments = OTHER[case]
    for said in ranks(2, refused, **arguments):
        assert said is None if what is None else f"loaders differ in {what}" in said and "rank=0" in said


@pytest.mark.parametrize("case", [case for case in OTHER if case != "other epochs"])
def test_ranks_of_an_endless_run_that_do_not_divide_the_same_data_are_warned(ranks, case):
    what, arguments = OTHER[case]
    for rank, lines in enumerate(ranks(2, logged_in_an_endless_run, **arguments)):
        found = [line for line in lines if f"of 2 ranks, {1 - rank} has no loader of the same conversations" in line]
        assert len(found) == (what is not None)


def test_a_rank_of_an_endless_run_does_not_wait_for_loaders_of_others(ranks):
    # the data of each rank are its own, or the ranks are others than torch.distributed's
    alone = {"rank": [0, 0], "world_size": [1, 1]}
    assert ranks(2, logged_in_an_endless_run, conversations=[CHATS, CHATS[::-1]], **alone) == [[], []]
    other = {"rank": [0, 1], "world_size": [3, 3]}
    assert ranks(2, logged_in_an_endless_run, conversations=[CHATS, CHATS[::-1]], **other) == [[], []]


CASES = {
    "the default, in mid-epoch": dict(steps=5),
    "the beginning, where all lists are empty": dict(steps=0),
    "the end, where all lists are empty": dict(steps=1000, epochs=1),
    "no document waits": dict(steps=3, packing="pad"),
    "a stream, and its carried token": dict(steps=3, packing=Stream(overlap=True)),
    "a mixture, whose sources are counted": dict(steps=4, conversations=MIXED, packing="best_fit_crop"),
    "a producer process, shuffled": dict(steps=6, num_workers=1, seed=3, epochs=2),
}


@pytest.mark.parametrize("shard", ["rank", "row"])
@pytest.mark.parametrize("case", CASES)
def test_a_loader_goes_on_from_a_distributed_checkpoint(ranks, tmp_path, case, shard):
    arguments = {"rows": 4, "shard": shard, **CASES[case]}
    steps = arguments.pop("steps")
    saved = ranks(2, save_and_continue, tmp_path, steps, 4, **arguments)
    # before it loads, a loader may be at any step
    for world_size, in_vain in [(2, 7)] if shard == "rank" else [(2, 7), (1, 0), (4, 2)]:
        loaded = ranks(world_size, load_and_go_on, tmp_path, in_vain, 4, **arguments)
        assert together(loaded) == together(saved)


def together(answers):
    """What all ranks' batches hold, row by row, and where they stand together."""
    batches, states = zip(*answers, strict=True)
    return [list(itertools.chain(*parts)) for parts in zip(*batches, strict=True)], merge_states(states)


def test_a_checkpoint_in_the_background_holds_the_moment_at_which_it_was_begun(ranks, tmp_path):
    saved = ranks(2, save_and_continue, tmp_path, 5, 9, rows=4, num_workers=1, asynchronous=True)
    assert together(ranks(2, load_and_go_on, tmp_path, 0, 9, rows=4, num_workers=1)) == together(saved)


@pytest.mark.parametrize("shard", ["rank", "row"])
def test_what_one_rank_saves_is_where_all_of_them_go_on(ranks, shard):
    answers = ranks(3, gathered_state, shard=shard, seed=1)
    states, batches = zip(*answers, strict=True)
    assert states[0] == states[1] == states[2]
    for rank, expected in enumerate(batches):
        with Loader(CHATS, BYTES, 2, 16, num_workers=0, shard=shard, seed=1, rank=rank, world_size=3) as loader:
            loader.load_state_dict(states[0])
            assert rows_of([next(loader)]) == expected


def test_a_checkpoint_sharded_by_ranks_is_refused_by_other_ranks(ranks, tmp_path):
    ranks(2, save_and_continue, tmp_path, 5, 0, rows=4)
    with pytest.raises(AssertionError, match=r"ValueError: .* world_size was 2, is 1"):
        ranks(1, load_and_go_on, tmp_path, 0, 0, rows=4)


def test_a_loader_is_what_a_distributed_checkpoint_calls_stateful():
    assert isinstance(Loader(CHATS, BYTES, 2, 16, num_workers=0), Stateful)
