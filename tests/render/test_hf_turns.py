"""turns="each" with the chat templates of reasoning models: earlier thoughts are dropped, the answer's own trained."""

from __future__ import annotations

import pytest

from nanopack import Loader, verify

pytest.importorskip("transformers", reason="needs transformers: pip install 'nanopack-gpu[hf]'")

from stock_templates import folder, make_stock

if folder() is None:
    pytest.skip("needs trl, whose chat templates these are: pip install trl", allow_module_level=True)

THOUGHTS = ("Two threes.", "Four fives.", "One and one.")
ANSWERS = ("Six.", "Twenty.", "Two.")
CHAT = [
    message
    for question, thought, answer in zip(("2 * 3?", "4 * 5?", "1 + 1?"), THOUGHTS, ANSWERS, strict=True)
    for message in (
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer, "reasoning_content": thought},
    )
]
ROW = dict(batch_size=1, seq_len=512, packing="pad", template="hf", turns="each", epochs=1, device="cpu", num_workers=0)
# Chat templates that forget the thoughts of earlier turns.
FORGETFUL = ["qwen3", "qwen3_5_think", "qwen3_6", "nemotron_3_nano"]


def documents(tokenizer, chat):
    """The ids of each document, and the text in its loss."""
    with Loader([chat], tokenizer, **ROW) as loader:
        for batch in loader:
            said = [id for id in batch.targets[0].tolist() if id != -100]
            yield batch.inputs[0, : batch.num_tokens].tolist(), tokenizer.decode(said)
        assert loader.ledger()["ignored_keys"] == {}


@pytest.mark.parametrize("name", FORGETFUL)
def test_each_document_is_what_the_template_writes_up_to_its_answer(name):
    tokenizer, found = make_stock(name), [*documents(make_stock(name), CHAT)]
    assert len(found) == 3
    for number, (ids, _) in enumerate(found):
        written = tokenizer.apply_chat_template(CHAT[: 2 * number + 2], return_dict=True)["input_ids"]
        assert ids == written
        text = tokenizer.decode(ids)
        assert THOUGHTS[number] in text and not any(thought in text for thought in THOUGHTS[:number])


@pytest.mark.parametrize("name", FORGETFUL)
def test_an_answer_and_its_thoughts_alone_are_in_the_loss(name):
    for number, (_, said) in enumerate(documents(make_stock(name), CHAT)):
        assert THOUGHTS[number] in said and ANSWERS[number] in said
        assert not any(other in said for other in ANSWERS[:number] + ANSWERS[number + 1 :])


@pytest.mark.parametrize("name", FORGETFUL)
def test_the_reference_agrees(name):
    assert verify([CHAT, CHAT[:2]], make_stock(name), **ROW)


def test_an_answer_of_weight_0_is_history_without_a_document_of_its_own():
    chat = [*CHAT[:3], {**CHAT[3], "weight": 0}, *CHAT[4:]]
    assert [said for _, said in documents(make_stock("qwen3"), chat)] == [
        *(said for number, (_, said) in enumerate(documents(make_stock("qwen3"), CHAT)) if number != 1)
    ]
