"""Promises of nanopack/witness.py: what other libraries have in the loss, compared token by token."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nanopack import verify, witness
from nanopack.cli.main import main

pytest.importorskip("transformers", reason="needs transformers: pip install 'nanopack-gpu[hf]'")

from stock_templates import folder, make_stock
from tiny_hf import MARKED, PLAIN, make_tokenizer

U, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
BAD = {"role": "assistant", "content": "B", "weight": 0}
AXOLOTL = {"input_ids": [5, 6, 7, 8], "attention_mask": [1, 1, 1, 0], "labels": [5, -100, 7, -100]}
needs_trl = pytest.mark.skipif(folder() is None, reason="needs trl: pip install trl")


def test_transformers_has_the_marked_answers_in_the_loss_as_we_do():
    chats = [[U, A], {"messages": [U, A, U, A]}, {"text": "not a chat"}, {"prompt": [U], "completion": [A]}]
    found = verify(chats, make_tokenizer(MARKED), against="transformers", template="hf")
    assert found
    assert (found.conversations, found.unread, found.refused) == (3, 1, 0)
    assert 0 < found.num_loss_tokens < found.tokens


def test_the_first_difference_is_shown_in_text():
    found = verify([[U, A], [U, BAD, U, A]], make_tokenizer(MARKED), against="transformers", template="hf")
    assert not found
    assert found.conversations == 1
    assert found.difference == (
        "conversation 1, token 12: 'B' is in the loss of transformers, not of nanopack; before it stands "
        "'<|im_start|>user\\nQ<|im_end|>\\n<|im_start|>assistant\\n'"
    )


@pytest.mark.parametrize(
    ("own", "other", "difference"),
    [
        ([(1, True)], [(1, True)], None),
        ([(1, True)], [(2, True)], "token 0: nanopack has [1], trl has [2]; before it stands []"),
        ([(1, True)], [(1, False)], "token 0: [1] is in the loss of nanopack, not of trl; before it stands []"),
        ([(1, True)], [(1, True), (2, False)], "token 1: trl has [2], nanopack has nothing more; before it stands [1]"),
        ([(1, True), (2, False)], [(1, True)], "token 1: nanopack has [2], trl has nothing more; before it stands [1]"),
    ],
)
def test_a_difference_names_the_token_and_who_has_it(own, other, difference):
    assert witness.first_difference(own, other, None, "trl") == difference


def test_a_labels_column_is_what_is_in_the_loss():
    found = verify([AXOLOTL, {"text": "x"}], "chat32k", against="axolotl-like")
    assert found
    assert (found.conversations, found.tokens, found.num_loss_tokens, found.unread) == (1, 3, 2, 1)


@needs_trl
def test_trl_trains_a_stock_template_by_its_own_and_differs_where_that_marks_more():
    tokenizer = make_stock("qwen3")
    found = verify([[U, A]], tokenizer, against="trl", template="hf")
    assert found.difference.endswith("<think>\\n\\n</think>\\n\\nA<|im_end|>'")
    assert "'\\n' is in the loss of trl, not of nanopack" in found.difference


@needs_trl
def test_trl_has_what_we_have_where_the_template_is_its_own():
    chats = [[U, A], [U, A, U, A], {"prompt": [U], "completion": [A]}, [A, U]]
    found = verify(chats, make_stock("qwen3_training"), against="trl", template="hf")
    assert found, found.difference
    assert found.conversations == 4


@pytest.mark.parametrize(
    ("against", "arguments", "error"),
    [
        ("trl", {"template": "chatml"}, "against='trl' compares chat templates; pass template='hf'"),
        (
            "transformers",
            {"template": "hf"},
            "against='transformers' reads {% generation %} marks, and the tokenizer's",
        ),
        ("someone", {"template": "hf"}, "against='someone' is not allowed; use one of 'trl', 'transformers', 'axolotl"),
        ("transformers", {"max_batches": 1}, "max_batches=1 has no meaning with against='transformers'"),
    ],
)
def test_what_cannot_be_compared_is_refused(against, arguments, error):
    with pytest.raises(ValueError) as caught:
        verify([[U, A]], make_tokenizer(PLAIN), against=against, **arguments)
    assert str(caught.value).startswith(error)


def test_the_command_line_asks_a_witness(tmp_path, capsys):
    path = tmp_path / "axolotl.jsonl"
    path.write_text(json.dumps(AXOLOTL) + "\n")
    assert main(["verify", str(path), "--against", "axolotl-like"]) == 0
    assert capsys.readouterr().out == (
        "as axolotl-like has it: 2 of 3 tokens in the loss; conversations: 1, refused: 0, unread: 0\n"
    )


def test_nothing_compared_is_not_equal(tmp_path, capsys):
    for records in ([{"text": "x"}], [[A | {"role": "judge"}]], [{"input_ids": [5, 6]}]):
        found = verify(records, "chat32k", against="axolotl-like")
        assert not found
        assert (found.conversations, found.difference) == (0, None)
    (tmp_path / "r.jsonl").write_text(json.dumps({"text": "x"}))
    assert main(["verify", str(tmp_path / "r.jsonl"), "--against", "axolotl-like"]) == 1
    assert capsys.readouterr().out == (
        "not what axolotl-like can confirm: there is nothing to compare; conversations: 0, refused: 0, unread: 1\n"
    )
    assert not verify([{"text": 3}], "chat32k", on_error="skip", num_workers=0)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [U, A], "tools": "[]", "chat_template_kwargs": "{}"},
        {"messages": [U, A], "chat_template_kwargs": '{"enable_thinking": false}'},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "tools": ""},
        {"prompt": "Q", "messages": [U, A]},
        {"prompt": [U], "completion": [A, U, A]},
        {"messages": [U | {"content": None}, A]},
        {"messages": 3},
        {"messages": {"role": ["user", "assistant"], "content": ["Q", "A"]}},
        {"prompt": "Q", "completion": "A"},
        7,
        None,
    ],
    ids=str,
)
@needs_trl
def test_a_witness_reads_or_leaves_any_record_and_never_differs_by_its_form(record):
    tokenizer = make_stock("qwen3_training")
    for against in ("trl", "transformers", "axolotl-like"):
        found = verify([record, [U, A], {**AXOLOTL}], tokenizer, against=against, template="hf")
        assert found, found.difference
        assert found.conversations + found.refused + found.unread == 3
        assert found.conversations == (1 if against == "axolotl-like" else found.conversations) > 0


def test_an_array_of_messages_is_left_or_read():
    messages = np.empty(2, object)
    messages[:] = [U, A]
    found = verify([messages, [U, A]], make_tokenizer(MARKED), against="transformers", template="hf")
    assert found
    assert found.conversations + found.unread == 2


@needs_trl
@pytest.mark.parametrize(
    ("record", "difference"),
    [
        ({"messages": [U, A], "system": "S"}, "has"),
        ({"messages": [U, A | {"weight": 0}]}, "is in the loss of trl, not of nanopack"),
        ({"messages": [U, A], "weight": 0}, "is in the loss of trl, not of nanopack"),
    ],
    ids=["system", "message", "record"],
)
def test_what_trl_ignores_and_we_obey_is_a_difference(record, difference):
    found = verify([record], make_stock("qwen3_training"), against="trl", template="hf")
    assert not found
    assert difference in found.difference


def test_a_wrong_template_a_wrong_label_and_a_wrong_loss_are_not_equal():
    wrong = (
        MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        + "{% generation %}{% endgeneration %}"
    )
    assert not verify([[U, A]], make_tokenizer(wrong), against="transformers", template="hf", on_error="skip")
    assert not verify([[U, A, U, A]], make_tokenizer(MARKED), against="transformers", template="hf", loss="last")
    assert verify([[U, A]], make_tokenizer(MARKED), against="transformers", template="hf", loss="last")
    with pytest.raises(ValueError, match=r"loss='all' puts every token in it; leave it out"):
        verify([[U, A]], make_tokenizer(MARKED), against="transformers", template="hf", loss="all")


@needs_trl
def test_a_template_that_trl_cannot_train_by_is_refused():
    with pytest.raises(ValueError, match="not training-compatible"):
        verify([[U, A]], make_tokenizer(PLAIN), against="trl", template="hf")
