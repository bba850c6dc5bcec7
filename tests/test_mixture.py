"""Every conversation comes, in its share, in an order that only the arguments decide."""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

import nanopack
from nanopack import ConversationError, Loader, mixture, reference
from nanopack.conversations.records import Source
from nanopack.mixture import MAX_PICKS, Mixture
from nanopack.tokenizers.tokenizer import NANOCHAT_SPECIAL_TOKENS
from nanopack.verify import compare

BYTES = byte_tokenizer(specials=NANOCHAT_SPECIAL_TOKENS)


class Numbers:
    """n conversations, each of them its own number, and a note of those that were asked for."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        self.asked.append(index)
        return index


def texts(n: int, tokens: int) -> list[dict[str, str]]:
    """n conversations of this many tokens each."""
    return [{"text": "x" * (tokens - 1)} for _ in range(n)]


def picks(mixed: Mixture) -> list[tuple[int, Any]]:
    return [(mixed.source_of(index), mixed[index]) for index in range(len(mixed))]


numbers = st.integers(1, 9) | st.sampled_from([0.1, 0.25, 0.3, 0.7, 1.5, 1e-1, 2.0])
shares = st.lists(st.tuples(st.integers(1, 20), numbers), min_size=1, max_size=5)
seeds = st.integers(0, 2**70)


def mix(sizes_and_weights: list[tuple[int, Any]], seed: int = 0) -> Mixture:
    return mixture([(Numbers(size), weight) for size, weight in sizes_and_weights], seed)


# What comes


def counts_by_hand(sizes_and_weights: list[tuple[int, Any]]) -> list[int]:
    """The shortest pass that has room for all, shared out by largest remainder, one pick at a time."""
    weights = [Fraction(str(weight)) for _, weight in sizes_and_weights]
    n = 1
    while any(n * weight < size * sum(weights) for (size, _), weight in zip(sizes_and_weights, weights, strict=True)):
        n += 1
    exact = [n * weight / sum(weights) for weight in weights]
    counts = [math.floor(count) for count in exact]
    for _ in range(n - sum(counts)):
        lacking = [e - c for e, c in zip(exact, counts, strict=True)]
        counts[lacking.index(max(lacking))] += 1
    return counts


@given(shares, seeds)
def test_counts_are_the_shares_rounded_by_largest_remainder(wanted: list[tuple[int, Any]], seed: int) -> None:
    mixed = mix(wanted, seed)
    counted = Counter(source for source, _ in picks(mixed))
    assert [counted[source] for source in range(len(wanted))] == counts_by_hand(wanted)


@given(shares, seeds)
def test_every_conversation_comes_once_in_every_pass_over_its_source(wanted: list[tuple[int, Any]], seed: int) -> None:
    picked = picks(mix(wanted, seed))
    for source, (size, _) in enumerate(wanted):
        order = [conversation for its_source, conversation in picked if its_source == source]
        assert len(order) >= size
        for begin in range(0, len(order), size):
            of_a_pass = order[begin : begin + size]
            assert len(set(of_a_pass)) == len(of_a_pass)
            assert set(of_a_pass) <= set(range(size))


def test_a_float_weighs_what_it_prints_as() -> None:
    # In binary fractions the larger source would need an eleventh pick.
    assert len(mix([(7, 0.7), (3, 0.3)])) == 10
    assert picks(mix([(7, 0.7), (3, 0.3)])) == picks(mix([(7, np.float32(0.7)), (3, np.float64(0.3))]))
    assert picks(mix([(7, 7), (3, 3)])) == picks(mix([(7, np.int64(7)), (3, Fraction(3))]))


# In which order


@given(shares, seeds)
def test_every_beginning_is_within_a_pick_a_source_of_its_shares(wanted: list[tuple[int, Any]], seed: int) -> None:
    mixed = mix(wanted, seed)
    n = len(mixed)
    sources = np.array([mixed.source_of(index) for index in range(n)])
    for source in range(len(wanted)):
        its = sources == source
        count = its.sum()
        # A source is less than 1 off its stretches, and so is each of the others, which moves the end of the beginning.
        bound = (n - count) + count * (len(wanted) - 1)
        assert (abs(its.cumsum() * n - np.arange(1, n + 1) * count) <= bound).all()


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_rank_has_its_share_of_every_source(world_size: int) -> None:
    mixed = mix([(2000, 1), (2000, 1)])
    for rank in range(world_size):
        sources = [mixed.source_of(index) for index in range(rank, len(mixed), world_size)]
        assert 0.45 < sum(sources) / len(sources) < 0.55


def test_the_same_seed_gives_the_same_picks_and_another_seed_others() -> None:
    wanted = [(30, 1), (40, 2)]
    assert picks(mix(wanted, 5)) == picks(mix(wanted, 5))
    orders = [picks(mix(wanted, seed)) for seed in (0, 1, 2, 2**32, 2**64)]
    for number, order in enumerate(orders):
        for other in orders[:number]:
            assert order != other
            assert [source for source, _ in order] != [source for source, _ in other]
            for its in (0, 1):
                assert [pick for pick in order if pick[0] == its] != [pick for pick in other if pick[0] == its]


def test_a_source_has_a_new_order_in_each_of_its_passes_and_another_than_its_neighbour() -> None:
    picked = picks(mix([(30, 3), (30, 3), (90, 1)]))
    first, second = ([pick for source, pick in picked if source == its] for its in (0, 1))
    passes = [tuple(order[begin : begin + 30]) for order in (first, second) for begin in range(0, 270, 30)]
    assert len(set(passes)) == 18
    assert tuple(range(30)) not in passes


def test_the_picks_are_these_whatever_the_machine_and_the_version_of_numpy() -> None:
    expected = [(1, 1), (0, 0), (0, 3), (0, 1), (1, 0), (0, 2), (0, 4), (1, 1)]
    assert picks(mix([(5, 2), (2, 1)], seed=1)) == expected


def test_picks_are_the_same_in_any_order_of_asking() -> None:
    mixed = mix([(9, 1), (4, 3)])
    backwards = [(mixed.source_of(index), mixed[index]) for index in reversed(range(len(mixed)))]
    assert backwards[::-1] == picks(mixed)
    assert mixed[np.int64(3)] == mixed[3]


def test_sources_are_asked_with_pythons_integers() -> None:
    class Strict(Numbers, Source):
        def __getitem__(self, index: int) -> Any:
            return type(index)

        def where(self, index: int) -> str:
            return type(index).__name__

    mixed = mixture([(Strict(3), 1, "strict")])
    assert mixed[np.int64(1)] is int
    assert mixed.where(np.int64(1)) == "int of strict"


@pytest.mark.parametrize("index", [-1, 12, 2**40])
def test_outside_there_is_nothing(index: int) -> None:
    mixed = mix([(9, 3), (3, 1)])
    for call in (mixed.__getitem__, mixed.where, mixed.source_of):
        with pytest.raises(IndexError, match=f"conversation {index} of 12"):
            call(index)


# Names and places


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a.jsonl and b.jsonl, whose lines say where they stand."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        lines = [json.dumps({"text": f"{name}.jsonl:{number}"}) for number in range(1, 4)]
        Path(f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_names_are_the_path_or_glob_or_number_or_what_is_given(folder: Path) -> None:
    sources: list[Any] = [("a.jsonl", 1), (Path("b.jsonl"), 1), ("?.jsonl", 1), (["a.jsonl"], 1), (Numbers(1), 1)]
    assert mixture(sources).names == ("a.jsonl", "b.jsonl", "?.jsonl", "source 3", "source 4")
    assert mixture([("a.jsonl", 1, "chat"), [Numbers(2), 1, "more"]]).names == ("chat", "more")


def test_where_names_the_place_in_the_source(folder: Path) -> None:
    items = [{"text": f"conversation {number} of tales"} for number in range(4)]
    mixed = mixture([("?.jsonl", 1, "files"), (items, 2, "tales")])
    assert len(mixed) == 18
    for index in range(len(mixed)):
        assert mixed.where(index) == mixed[index]["text"]


def test_mixtures_mix(folder: Path) -> None:
    chat = mixture([("a.jsonl", 2), ([{"text": "conversation 0 of notes"}], 1, "notes")], seed=3)
    mixed = mixture([(chat, 3, "chat"), ([{"text": "conversation 0"}], 1)], seed=4)
    # 5 of 7 picks are chat's, so that its own 5 all come: 3 lines, and twice the note.
    assert Counter(record["text"] for _, record in picks(mixed)) == {
        "a.jsonl:1": 1,
        "a.jsonl:2": 1,
        "a.jsonl:3": 1,
        "conversation 0 of notes": 2,
        "conversation 0": 2,
    }
    for index, (source, record) in enumerate(picks(mixed)):
        assert mixed.where(index) == f"{record['text']} of {mixed.names[source]}"


# By token


def test_weights_by_token_are_shares_of_the_tokens() -> None:
    short, long = texts(40, tokens=10), texts(40, tokens=30)
    mixed = mixture([(short, 1), (long, 1)], by="token", tokenizer=BYTES)
    assert Counter(source for source, _ in picks(mixed)) == {0: 120, 1: 40}
    assert picks(mixed) == picks(mixture([(short, 3), (long, 1)]))


def test_lengths_are_those_of_the_template() -> None:
    # 1 token as text; as a message bos, start, text and end.
    messages = [{"role": "user", "content": "x" * 7}]
    mixed = mixture([([messages], 1), (texts(1, tokens=5), 1)], by="token", tokenizer=BYTES)
    assert Counter(source for source, _ in picks(mixed)) == {0: 1, 1: 2}


@pytest.mark.parametrize(("n", "asked"), [(3, 3), (512, 512), (513, 512), (5000, 512)])
def test_the_sample_is_evenly_spaced(n: int, asked: int) -> None:
    class Texts(Numbers):
        def __getitem__(self, index: int) -> Any:
            return {"text": "x" * super().__getitem__(index)}

    data = Texts(n)
    mixture([(data, 1)], by="token", tokenizer=BYTES)
    assert data.asked[0] == 0 and len(data.asked) == asked
    assert set(np.diff([*data.asked, n])) <= {n // asked, -(-n // asked)}


def test_nothing_is_read_before_it_is_asked_for() -> None:
    data = Numbers(10)
    mixed = mixture([(data, 1)])
    assert data.asked == []
    assert data.asked == [mixed[7]]


class Bad(Numbers):
    def __getitem__(self, index: int) -> Any:
        raise KeyError("no such thing")


def test_bad_conversations_count_nothing_in_the_sample() -> None:
    some_bad: list[Any] = [{"text": 1}, *texts(2, tokens=10), {"messages": [{"role": "assistant", "content": ""}]}]
    mixed = mixture([(some_bad, 1), (texts(4, tokens=10), 1)], by="token", tokenizer=BYTES)
    assert Counter(source for source, _ in picks(mixed)) == {0: 4, 1: 4}


@pytest.mark.parametrize(
    ("source", "first"),
    [
        pytest.param([{"text": 1}] * 3, r"conversation 0, text must be a str, not 1 of type int", id="record"),
        pytest.param([[{"role": "assistant", "content": ""}]] * 3, r"0, message 0: role is 'assistant'", id="template"),
        pytest.param(Bad(3), r"conversation 0, 'no such thing'", id="data-set"),
    ],
)
def test_a_sample_of_bad_conversations_is_an_error(source: Any, first: str) -> None:
    message = rf"^sources\[1\]: all 3 .* are bad, so its length cannot be measured. The first: .*{first}.* Fix"
    with pytest.raises(ValueError, match=message):
        mixture([(texts(1, tokens=2), 1), (source, 1)], by="token", tokenizer=BYTES)


def test_running_out_of_memory_makes_no_conversation_bad() -> None:
    class Huge(Numbers):
        def __getitem__(self, index: int) -> Any:
            raise MemoryError

    with pytest.raises(MemoryError):
        mixture([(Huge(2), 1)], by="token", tokenizer=BYTES)


# Errors

ERRORS: dict[str, tuple[Any, str]] = {
    "no-source": ([], r"^sources=\[\] is not allowed; give a list of at least one \(source, weight\)$"),
    "a-dict": ({"a.jsonl": 1}, r"^sources={'a.jsonl': 1} is not allowed; give a list"),
    "a-path": ("a.jsonl", r"^sources='a.jsonl' is not allowed; give a list"),
    "a-pair-alone": (("a.jsonl", 1), r"^sources\[0\]='a.jsonl' is not a pair; give \(source, weight\) or"),
    "no-weight": ([("a.jsonl",)], r"^sources\[0\]=\('a.jsonl',\) is not a pair; give"),
    "too-much": ([(Numbers(1), 1), ("a.jsonl", 1, "a", 2)], r"^sources\[1\]=\('a.jsonl', 1, 'a', 2\) is not a pair"),
    "name-none": ([(Numbers(1), 1, None)], r"^sources\[0\]: name=None is not allowed; give a str"),
    "name-empty": ([(Numbers(1), 1, "")], r"^sources\[0\]: name='' is not allowed; give a str"),
    "empty": ([(Numbers(1), 1), ([], 1)], r"^sources\[1\]: conversations=\[\] holds no conversation; give at least"),
    "missing": ([("none.jsonl", 1)], r"^sources\[0\]: conversations='none.jsonl' does not exist"),
    "rare": (
        [(Numbers(1), 1), (Numbers(1000), 1e-9, "rare")],
        rf"^sources\[1\] \(rare\) has 1000 conversations and a share of 1e-09: .* 1000000001000 picks, and at most "
        rf"{MAX_PICKS} are allowed; raise its weight, or give fewer",
    ),
}
WEIGHTS = {"zero": 0, "zero-float": 0.0, "negative": -1, "nan": math.nan, "inf": math.inf, "none": None, "str": "1"}
WEIGHTS |= {"bool": True, "complex": 1j, "list": [1]}
ERRORS |= {
    f"weight-{name}": ([(Numbers(1), 1), (Numbers(1), weight)], r"^sources\[1\]: weight=.* is not allowed; give a num")
    for name, weight in WEIGHTS.items()
}


@pytest.mark.parametrize("edge", ERRORS)
def test_what_cannot_be_mixed_is_an_error_that_names_place_value_and_remedy(edge: str) -> None:
    sources, message = ERRORS[edge]
    with pytest.raises(ValueError, match=message):
        mixture(sources)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"seed": -1}, r"^seed=-1 is not allowed; use an int from 0", id="seed-negative"),
        pytest.param({"seed": 1.0}, r"^seed=1.0 is not allowed", id="seed-float"),
        pytest.param({"seed": None}, r"^seed=None is not allowed", id="seed-none"),
        pytest.param({"by": "tokens"}, r"^by='tokens' is not allowed; use one of 'conversation', 'token'$", id="by"),
        pytest.param({"by": ["token"]}, r"^by=\['token'\] is not allowed", id="by-unhashable"),
        pytest.param({"by": "token"}, r"^by='token' needs a tokenizer .*; pass tokenizer=", id="no-tokenizer"),
        pytest.param({"tokenizer": BYTES}, r"^tokenizer has no meaning with by='conversation'", id="tokenizer"),
        pytest.param({"by": "token", "tokenizer": "none"}, r"^tokenizer=.none. is neither ", id="tokenizer-none"),
        pytest.param(
            {"by": "token", "tokenizer": BYTES, "template": "x"}, r"^template='x' is not one of", id="template"
        ),
    ],
)
def test_an_argument_that_cannot_be_is_an_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture([(texts(1, tokens=2), 1)], **arguments)


def test_a_tokenizer_that_cannot_write_the_template_is_no_fault_of_the_sample() -> None:
    talk = [{"messages": [{"role": "user", "content": "hi"}]}]
    with pytest.raises(nanopack.render.TemplateError, match="lacks special tokens of template='chatml'"):
        mixture([(talk, 1)], by="token", tokenizer=BYTES, template="chatml")


# In use


def chats(folder: Path, seed: int = 0) -> Mixture:
    """A new mixture of a file, a list and a mixture."""
    inner = mixture([(texts(5, tokens=7), 1), (texts(3, tokens=12), 2)], seed=9)
    items = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!" * n}] for n in range(7)]
    return mixture([("[ab].jsonl", 2), (items, 1), (inner, 1.5)], seed)


@pytest.mark.parametrize("packing", ["best_fit", "stream", "best_fit_crop", "pad"])
def test_the_loader_gives_the_batches_of_the_reference(folder: Path, packing: str) -> None:
    arguments: dict[str, Any] = {"batch_size": 2, "seq_len": 24, "packing": packing, "epochs": 2}
    share = {"rank": 1, "world_size": 2}
    expected = reference.batches(chats(folder), BYTES, **arguments, **share)
    with Loader(chats(folder), BYTES, num_workers=0, **arguments, **share) as loader:
        found = compare(expected, loader)
    assert found and found.batches > 5


def test_the_producers_process_takes_a_mixture(folder: Path) -> None:
    found = nanopack.verify(chats(folder), BYTES, batch_size=2, seq_len=24, num_workers=1, device="cpu")
    assert found and found.batches > 5


def test_a_bad_conversation_is_named_by_its_source() -> None:
    bad = mixture([(texts(3, tokens=2), 1), ([{"text": 7}], 1, "bad ones")])
    with (
        Loader(bad, BYTES, batch_size=1, seq_len=64, num_workers=0, device="cpu") as loader,
        pytest.raises(ConversationError, match=r"^conversation 0 of bad ones, text must be a str"),
    ):
        next(loader)


def test_a_mixture_pickles_to_four_bytes_a_pick(folder: Path) -> None:
    mixed = chats(folder)
    again = pickle.loads(pickle.dumps(mixed))
    assert picks(again) == picks(mixed)
    assert [again.where(index) for index in range(len(mixed))] == [mixed.where(index) for index in range(len(mixed))]
    large = mix([(100_000, 1), (100, 1)])
    assert len(large) == 200_000
    assert len(pickle.dumps(large)) < 4 * len(large) + 2000
