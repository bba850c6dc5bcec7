"""What explain says of ids that no text has: the rest of its promises stand in test_loader.py."""

from __future__ import annotations

import json

import pytest
from data_sets import byte_tokenizer

from nanopack import Loader, cli
from nanopack.cli.html import explain_rows, page_data
from nanopack.explain import text_of
from nanopack.tokenizers.tokenizer import load_tokenizer


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
