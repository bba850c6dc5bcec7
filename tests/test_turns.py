"""turns="each": every answer in the loss is a document, with what was said before it and nothing else in the loss."""

from __future__ import annotations

import json
import pickle
from itertools import islice, zip_longest
from typing import Any

import pytest
from data_sets import PACKINGS, SMALL, drawn_arguments, plain_texts, rendered_elsewhere, texts
from hypothesis import given
from hypothesis import strategies as st

import nanopack
from nanopack import ConversationError, Loader, mixture, reference, verify
from nanopack.conversations.answers import Answers
from nanopack.conversations.data_sets import open_conversations
from nanopack.errors import StorageError
from nanopack.verify import first_difference

Q, A, Q2, A2 = (
    {"role": role, "content": content}
    for role, content in (("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
)
ROW: dict[str, Any] = dict(batch_size=1, seq_len=64, device="cpu", num_workers=0, packing="pad", epochs=1)


@st.composite
def long_chats(draw):
    messages = []
    for i in range(draw(st.integers(1, 7))):
        message = {"role": "assistant" if i % 2 else "user", "content": draw(texts)}
        messages.append({**message, "weight": draw(st.sampled_from([0, 1, 1]))} if i % 2 else message)
    # the last of these is bad: its roles do not alternate, or its shape is unknown
    bad = draw(st.sampled_from([None] * 8 + ["roles", "shape"]))
    messages += [{"role": "user", "content": "x"}] * (2 if bad == "roles" else 0)
    record = {"messages": [*messages, {"role": "nobody", "content": ""}] if bad == "shape" else messages}
    return {**record, "weight": draw(st.sampled_from([0, 0.5, 1, 2]))} if draw(st.booleans()) else record


conversations_of_all_kinds = st.lists(long_chats() | plain_texts | rendered_elsewhere(), min_size=1, max_size=8)


@st.composite
def mixed_or_not(draw):
    conversations = draw(conversations_of_all_kinds)
    if draw(st.booleans()):
        return conversations
    return mixture([(conversations, 2), (draw(conversations_of_all_kinds), 1)], seed=draw(st.integers(0, 9)))


def each(draw, packing):
    return {**draw(drawn_arguments(packing)), "loss": "assistant", "turns": "each", "on_error": "skip"}


def outcome(batches, most):
    """The batches up to an error, and that error's kind."""
    got = []
    try:
        for batch in islice(batches, most):
            got.append(batch)
    except ValueError as error:
        return got, type(error)
    return got, None


@pytest.mark.parametrize("packing", PACKINGS)
@given(data=st.data())
def test_batches_are_the_references(packing, data):
    conversations, arguments = data.draw(mixed_or_not()), each(data.draw, packing)
    loader = Loader(conversations, SMALL, device="cpu", num_workers=0, **arguments)
    got, error = outcome(loader, 8)
    expected, expected_error = outcome(reference.batches(conversations, SMALL, **arguments), 8)
    assert error == expected_error
    # where it fails, the loader may have read a batch ahead less than the reference
    for a, b in zip(expected, got, strict=True) if error is None else zip(expected, got, strict=False):
        assert first_difference(a, b) is None
    assert loader.ledger()["balanced"]


@pytest.mark.parametrize("packing", PACKINGS)
@given(data=st.data())
def test_resumed_anywhere_it_gives_the_same_batches(packing, data):
    conversations, arguments = data.draw(mixed_or_not()), {**each(data.draw, packing), "epochs": 2}
    whole = Loader(conversations, SMALL, device="cpu", num_workers=0, **arguments)
    expected, error = outcome(whole, None)
    if error is not None or not expected:
        return
    first = Loader(conversations, SMALL, device="cpu", num_workers=0, **arguments)
    got = list(islice(first, data.draw(st.integers(0, len(expected)))))
    second = Loader(conversations, SMALL, device="cpu", num_workers=0, **arguments)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    got += iter(second)
    assert [first_difference(a, b) for a, b in zip_longest(expected, got)] == [None] * len(expected)
    assert second.ledger() == whole.ledger()


@pytest.mark.parametrize("shard", ["rank", "row"])
def test_all_ranks_together_deliver_every_answer_once(shard):
    chats = [[Q, A, Q2, A2] * (1 + i % 3) for i in range(20)]
    seen = []
    for rank in range(3):
        arguments = {**ROW, "turns": "each", "shard": shard, "seed": 5, "rank": rank, "world_size": 3}
        seen += [piece.conversation for batch in Loader(chats, SMALL, **arguments) for [piece] in batch.pieces if piece]
    assert sorted(number for number in seen if number >= 0) == [*range(sum(len(chat) // 2 for chat in chats))]


def test_processes_give_the_batches_of_the_trainers_own_thread():
    chats = [[Q, A, Q2, A2] * (1 + i % 3) for i in range(40)]
    arguments = {**ROW, "batch_size": 4, "turns": "each", "packing": "best_fit", "seed": 1}
    expected = list(Loader(chats, SMALL, **arguments))
    with Loader(chats, SMALL, **{**arguments, "num_workers": 2}) as loader:
        assert [first_difference(a, b) for a, b in zip_longest(expected, loader)] == [None] * len(expected)
        assert len(loader) == len(expected)


def in_loss(loader):
    """The text of each document, and what of it is in the loss."""
    decode, found = loader.tokenizer.decode, []
    for batch in loader:
        n = batch.num_tokens
        targets = [id for id in batch.targets[0].tolist() if id != -100]
        found.append((decode(batch.inputs[0, :n].tolist()), decode(targets)))
    return found


def test_each_answer_comes_with_what_was_said_before_and_alone_in_the_loss():
    with Loader([[Q, A, Q2, A2], {"text": "t"}], SMALL, template="chatml", turns="each", **ROW) as loader:
        bos = loader.tokenizer.decode([loader.tokenizer.bos_id])
        one = f"{bos}<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        two = f"{one}<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        assert in_loss(loader) == [(one, "a<|im_end|>"), (two, "b<|im_end|>"), (f"{bos}t", "t")]
        assert loader.ledger()["conversations"]["copies"] == 1


def test_the_last_document_is_what_loss_last_makes_of_the_conversation():
    with Loader([[Q, A, Q2, A2]], SMALL, turns="each", **ROW) as loader:
        *_, last = in_loss(loader)
    with Loader([[Q, A, Q2, A2]], SMALL, loss="last", **ROW) as loader:
        assert in_loss(loader) == [last]


def test_answers_of_weight_0_are_history_only_and_a_chat_without_others_is_dropped():
    with Loader([[Q, {**A, "weight": 0}, Q2, A2], [Q, {**A, "weight": 0}], [Q]], SMALL, turns="each", **ROW) as loader:
        assert [said for _, said in in_loss(loader)] == ["b<|assistant_end|>"]
        assert loader.ledger()["conversations"] == {
            **{"read": 3, "packed": 1, "dropped": {"untrained": 2}, "skipped": 0, "waiting": 0, "copies": 0}
        }


def test_a_conversation_of_weight_0_is_one_document_and_dropped():
    chats = [{"messages": [Q, A, Q2, A2], "weight": 0}, [Q, A]]
    with Loader(chats, SMALL, turns="each", **ROW) as loader:
        assert [said for _, said in in_loss(loader)] == ["a<|assistant_end|>"]
        assert loader.ledger()["conversations"]["dropped"] == {"untrained": 1}
    assert verify(chats, SMALL, turns="each", **ROW)


def test_an_answer_that_first_assistant_drops_is_no_document():
    chat, arguments = [A, Q, A2], {**ROW, "turns": "each"}
    with Loader([chat], SMALL, first_assistant="drop", **arguments) as loader:
        assert [said for _, said in in_loss(loader)] == ["b<|assistant_end|>"]
    with Loader([chat], SMALL, first_assistant="empty_user", **arguments) as loader:
        assert [said for _, said in in_loss(loader)] == ["a<|assistant_end|>", "b<|assistant_end|>"]
    assert verify([chat], SMALL, first_assistant="empty_user", **arguments)


def test_errors_and_explanations_name_the_conversation_and_the_answer(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, [[Q, A, Q2, A2], [Q, A, A, A2], {"nothing": 1}])))
    with Loader(path, SMALL, turns="each", **ROW) as loader:
        assert [loader.source.where(index).rpartition("/")[2] for index in range(len(loader.source))] == [
            *("chats.jsonl:1, answer 0", "chats.jsonl:1, answer 1"),
            *(f"chats.jsonl:2, answer {number}" for number in range(3)),
            "chats.jsonl:3",
        ]
        next(loader)
        # bos, then start, content and end of q, a, r; the target of column 10 is b
        explained = loader.explain(next(loader), 0, 10)
        assert explained.target.where.endswith("chats.jsonl:1, answer 1")
        assert (explained.target.message, explained.target.text, explained.in_loss) == (3, "b", True)
        next(loader)
        with pytest.raises(ConversationError, match=r"chats\.jsonl:2, answer 1, message 2: "):
            next(loader)
    with Loader(path, SMALL, turns="each", on_error="skip", **ROW) as loader:
        assert len(list(loader)) == 3
        assert loader.ledger()["conversations"]["skipped"] == 3


def test_a_mixture_keeps_its_picks_and_counts_copies_by_source():
    mixed = mixture([([[Q, A, Q2, A2]] * 6, 1, "long"), ([[Q, A]] * 6, 1, "short")], seed=3)
    with Loader(mixed, SMALL, turns="each", **ROW) as loader:
        list(loader)
        sources = loader.ledger()["sources"]
    assert {
        name: (counts["conversations"]["read"], counts["conversations"]["copies"]) for name, counts in sources.items()
    } == {
        "long": (12, 6),
        "short": (6, 0),
    }


class Drawn:
    """Conversations whose number of answers changes from reading to reading, as a user's transform may do."""

    def __len__(self):
        return 30

    def __getitem__(self, index):
        import random

        return [Q, A, Q2, A2] * random.randint(1, 3)


def test_a_data_set_that_draws_random_numbers_draws_them_by_conversation():
    assert verify(Drawn(), SMALL, turns="each", batch_size=2, seq_len=40, seed=4, device="cpu", num_workers=0)


def test_data_that_change_after_the_answers_were_counted_stop_the_run():
    chats = [[Q, A, Q2, A2]]
    loader = Loader(chats, SMALL, turns="each", **{**ROW, "num_workers": 0})
    chats[0] = [Q, A]
    with pytest.raises(StorageError, match=r"conversation 0, answer 0, it has 1 answers in the loss now, and 2"):
        list(loader)


@pytest.mark.parametrize("loss", ["all", "last"])
def test_other_losses_are_refused(loss):
    for make in (Loader, lambda *args, **kwargs: reference.batches(*args, batch_size=1, turns="each", loss=loss)):
        with pytest.raises(ValueError, match=f"loss='{loss}'"):
            make([[Q, A]], SMALL, **{**ROW, "turns": "each", "loss": loss})


def test_states_without_turns_are_of_whole_conversations_and_others_are_refused():
    whole, split = (Loader([[Q, A]], SMALL, turns=turns, **ROW) for turns in ("all", "each"))
    assert "turns" not in whole.state_dict()["fingerprint"]["arguments"]
    with pytest.raises(ValueError, match="turns was None, is 'each'"):
        split.load_state_dict(whole.state_dict())


def test_answers_pickle_for_processes_that_are_not_forked():
    answers = Answers(open_conversations([[Q, A, Q2, A2]]), "keep", None)
    again = pickle.loads(pickle.dumps(answers))
    assert [again[i] for i in range(2)] == [answers[i] for i in range(2)]


def test_a_long_count_is_announced(monkeypatch, caplog):
    monkeypatch.setattr(nanopack.conversations.announced, "PATIENCE", 0.0)
    Answers(open_conversations([[Q, A]] * 3), "keep", None)
    assert 'counting the answers for turns="each": 1 of 3 conversations are read after' in caplog.text
