"""What explain says of a token: its origin, whether it is in the loss and why, and ids that no text has."""

from __future__ import annotations

import functools
import itertools
import json

import pytest
from data_sets import PACKINGS, SMALL, byte_tokenizer, data_sets, drawn_arguments
from hypothesis import given
from hypothesis import strategies as st

import nanopack
from nanopack import cli
from nanopack.cli.html import explain_rows, page_data
from nanopack.explain import text_of
from nanopack.tokenizers.tokenizer import load_tokenizer

# In the caller's thread: tests/producer/test_process.py shows that a process gives the same batches.
Loader = functools.partial(nanopack.Loader, num_workers=0)


def test_explain_names_conversation_message_role_and_text():
    chat = {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": [{"type": "python", "text": "p"}, {"type": "python_output", "text": "o"}]},
        ]
    }
    loader = Loader([chat], byte_tokenizer(), 1, 24, epochs=1)
    [batch] = loader
    text = [loader.explain(batch, 0, col) for col in range(24)]
    assert text[0].input.text == "<|bos|>" and text[0].input.message is None
    assert [t.input.text for t in text[1:7]] == ["<|user_start|>", "S", "\n", "\n", "q", "<|user_end|>"]
    assert {t.input.role for t in text[1:7]} == {"user"} and text[7].input.role == "assistant"
    assert text[7].input.text == "<|assistant_start|>" and text[7].in_loss and text[7].target.text == "<|python_start|>"
    assert not text[10].in_loss and text[10].target.text == "<|output_start|>"
    assert "out of the loss" in text[10].reason
    assert text[20].input is None and "padding" in text[20].reason
    for col in range(24):
        assert text[col].in_loss == (batch.targets[0, col].item() != -100)


@given(data=st.data())
def test_explain_agrees_with_the_tensors_everywhere(data):
    packing = data.draw(st.sampled_from(PACKINGS))
    arguments = data.draw(drawn_arguments(packing)) | {"epochs": 1, "seq_len": data.draw(st.integers(1, 12))}
    arguments |= {"document_align": 1, "extras": (), "max_pieces": None}
    if packing in ("best_fit", "best_fit_pad", "pad") and arguments["seq_len"] % 3 == 0:
        arguments["document_align"] = 3
    loader = Loader(data.draw(data_sets), SMALL, **arguments)
    for batch in itertools.islice(loader, 2):
        for row in range(arguments["batch_size"]):
            for col in range(arguments["seq_len"]):
                found = loader.explain(batch, row, col)
                assert batch.inputs[row, col] == (256 if found.input is None else found.input.id)
                expected = found.target.id if found.in_loss else arguments["ignore_index"]
                assert batch.targets[row, col] == expected


@pytest.mark.parametrize(("row", "col", "name"), [(1, 0, "row"), (0, 8, "col"), (-1, 0, "row"), (0, -1, "col")])
def test_explain_refuses_a_place_outside_the_batch(row, col, name):
    loader = Loader([{"text": "ab"}], SMALL, 1, 8)
    with pytest.raises(IndexError, match=f"{name}=-?[0-9]+ is outside the batch"):
        loader.explain(next(loader), row, col)


@pytest.mark.parametrize(
    ("row", "col", "says"), [(0.5, "a", "row=0.5 is not an int; use 0 to 0"), (0, "a", "col='a' is")]
)
def test_explain_refuses_a_place_that_is_no_int(row, col, says):
    loader = Loader([{"text": "ab"}], SMALL, 1, 8)
    with pytest.raises(TypeError, match=f"^{says}"):
        loader.explain(next(loader), row, col)


def test_a_token_that_came_with_a_mask_is_explained_by_it():
    loader = Loader([{"input_ids": [97, 98, 99], "loss_mask": [1, 0, 1]}], SMALL, 1, 8, packing="pad")
    batch = next(loader)
    assert batch.inputs[0, :3].tolist() == [97, 98, 99] and batch.targets[0, :3].tolist() == [-100, 99, -100]
    assert loader.explain(batch, 0, 0).reason == "its mask keeps it out of the loss"
    assert loader.explain(batch, 0, 1).reason == "its mask puts it in the loss"


def with_a_gap():
    """A byte tokenizer whose ids end at 255 and continue at 300."""
    return byte_tokenizer(44, specials=["<|bos|>"])


def with_a_gap_of_hugging_face():
    tokenizers = pytest.importorskip("tokenizers")
    words = {**{chr(byte): byte for byte in range(97, 123)}, "<s>": 300}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


@pytest.mark.parametrize("make", [with_a_gap, with_a_gap_of_hugging_face])
def test_an_id_that_the_tokenizer_does_not_use_is_shown_as_itself(make):
    with Loader([{"input_ids": [97, 299, 98, 256]}], make(), 1, 4, packing="pad", num_workers=0) as loader:
        batch = next(loader)
        shown = [loader.explain(batch, 0, column) for column in range(4)]
        assert [found.input.text for found in shown] == ["a", "<299>", "b", "<256>"]
        assert str(shown[0]) == (
            "input 'a' (conversation 0, token 0); target '<299>' (conversation 0, token 1): "
            "in the loss, it came as input_ids, and no mask keeps it out of the loss"
        )
        assert page_data(explain_rows(batch, loader))["texts"] == ["a", "<299>", "b", "<256>"]


def test_a_character_of_several_tokens_stays_whole_between_ids_that_are_not_used():
    tokenizer = load_tokenizer(with_a_gap())
    assert text_of([299, *"é🙂".encode(), 256, 257, *"ü".encode(), 300], tokenizer) == "<299>é🙂<256><257>ü<|bos|>"
    assert text_of([], tokenizer) == ""


def test_inspect_lists_a_piece_with_ids_that_are_not_used(tmp_path, capsys, monkeypatch):
    (tmp_path / "ready.jsonl").write_text(json.dumps({"input_ids": [*b"hello", 299, *b"there"]}) + "\n")
    loader = Loader
    monkeypatch.setattr(
        "nanopack.cli.commands.Loader", lambda data, _, **options: loader(data, with_a_gap(), **options)
    )
    assert cli.main(["inspect", str(tmp_path / "ready.jsonl"), "--seq-len", "16", "--batch-size", "1"]) == 0
    assert "hello<299>there" in capsys.readouterr().out


@pytest.mark.parametrize("change", [lambda data: data.reverse(), lambda data: data.__setitem__(0, {"text": "a"})])
def test_data_that_changed_after_the_batch_are_not_explained_as_if_they_had_not(change):
    data = [{"text": "abcdef"}, {"text": "uvwxyz"}]
    with Loader(data, byte_tokenizer(), 1, 16, packing="stream") as loader:
        batch = next(loader)
        assert loader.explain(batch, 0, 3).input.text == "c"
        change(data)
        with pytest.raises(ValueError, match=r"conversation 0 is not what the batch was made of: its token 3"):
            loader.explain(batch, 0, 3)
