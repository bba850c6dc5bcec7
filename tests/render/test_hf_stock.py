"""Promises of template="hf" over the chat templates that trl ships: each conversation is right, or refused."""

from __future__ import annotations

import collections
import functools
import itertools
import pickle
import re

import numpy as np
import pytest

from nanopack import ConversationError, Loader, verify, witness
from nanopack.conversations.records import check
from nanopack.reference.documents import render as reference_render
from nanopack.reference.records import conversation
from nanopack.render.renderer import Renderer
from nanopack.tokenizers.tokenizer import for_template, load_tokenizer

pytest.importorskip("transformers", reason="needs transformers: pip install 'nanopack-gpu[hf]'")

from stock_templates import TALKS, folder, make_stock, names, source
from tiny_hf import MARKED, PLAIN, make_core, make_tokenizer

if folder() is None:
    pytest.skip("needs trl, whose chat templates these are: pip install trl", allow_module_level=True)

STOCK, TRAINING = names(training=False), names(training=True)
# What ends an answer in the texts of each, last and before.
ENDS = {
    "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<turn|>",
    "gemma4": "<turn|>",
    "gemma": "<end_of_turn>",
    "glm4moe": "<|user|>",
    "gptoss": "<|end|>",
    "idefics3": "<end_of_utterance>",
    "smolvlm": "<end_of_utterance>",
    "llama3": "<|eot_id|>",
    "llava": "</s>",
    "muse": "<|eot|>",
    "phi3": "<|end|>",
    **dict.fromkeys(("lfm2", "nemotron", "qwen"), "<|im_end|>"),
}
LAST = {"gptoss": "<|return|>", "phi3": "<|end|>\n</s>"}
# Before the calls of these stand no answers that end otherwise.
CALL_ENDS = {"gemma4": "<|tool_response>", "gemma4_v2": "<turn|>", "diffusion_gemma": "<|tool_response>"}
CALL_ENDS |= {"diffusion_gemma_training": "<tool_call|>", "gptoss": "<|call|>", "glm4moe": "<|observation|>"}
# What the prompt already says, in which templates differ from those for training.
PROMPTED = re.compile(
    r"^(<｜Assistant｜>|<\|start\|>assistant|<｜tool▁outputs▁end｜>)|<think>\s*</think>\s*|^\s*</think>"
)
FRAME = re.compile(r"^(<\|channel\|>final<\|message\|>| to=user<\|message\|>)")


def of_kind(table: dict[str, str], name: str) -> str | None:
    return next((value for key, value in sorted(table.items(), reverse=True) if name.startswith(key)), None)


@functools.cache
def renderer(name: str) -> Renderer:
    return Renderer(load_tokenizer(make_stock(name)), "hf")


@functools.cache
def outcome(name: str, kind: str) -> list[str] | str:
    """What is in the loss, in pieces, or the refusal."""
    try:
        document = renderer(name)(check(TALKS[kind]))
    except ConversationError as error:
        return str(error)
    borders = [0, *(np.flatnonzero(np.diff(document.mask)) + 1), len(document.mask)]
    decode = load_tokenizer(make_stock(name)).decode
    return [decode(document.ids[a:b]) for a, b in itertools.pairwise(borders) if document.mask[a]]


def bare(piece: str) -> str:
    """Without what the prompt says already, and white space at the ends."""
    return FRAME.sub("", PROMPTED.sub("", piece.rstrip())).strip().removeprefix("<think>").strip()


@pytest.mark.parametrize("kind", TALKS)
@pytest.mark.parametrize("name", [*STOCK, *TRAINING])
def test_each_answer_is_in_the_loss_with_its_end_or_refused(name, kind):
    found = outcome(name, kind)
    if isinstance(found, str):
        assert re.match(r"message \d: the chat template |the (tokenizer's )?chat template |chat_template_kwargs", found)
        return
    answers = [message for message in TALKS[kind]["messages"] if message["role"] == "assistant"]
    assert len(found) == len(answers)
    for number, (piece, answer) in enumerate(zip(found, answers, strict=True)):
        last = number + 1 == len(answers)
        if "tool_calls" in answer:
            end = CALL_ENDS.get(name) or of_kind(CALL_ENDS, name) or of_kind(ENDS, name)
            assert "multiply" in piece
            assert "7" in piece
            assert "metre" in piece
            assert piece.rstrip().endswith(end)
            continue
        end = (last and of_kind(LAST, name)) or of_kind(ENDS, name)
        thought = answer.get("reasoning_content", "")
        said = bare(piece)
        assert said.endswith(f"{answer['content']}{end}".strip())
        assert said.count(end) == 1
        rest = said.removesuffix(f"{answer['content']}{end}".strip())
        # An earlier turn's thought may be left out.
        assert thought in rest if (thought and last) or rest else not rest


@pytest.mark.parametrize("name", [*STOCK, *TRAINING])
def test_the_reference_reads_the_same_in_them(name):
    coder = load_tokenizer(make_stock(name))
    for talk in TALKS.values():
        try:
            document = renderer(name)(check(talk))
            ours = list(zip(document.ids.tolist(), document.mask.tolist(), strict=True))
        except ConversationError:
            ours = None
        try:
            theirs = reference_render(conversation(talk), coder, "hf")
        except ConversationError:
            theirs = None
        assert ours == theirs


# These take parts; given a string they lose it.
TAKE_PARTS = ("idefics3", "smolvlm", "llava")
TRAINED = [name for name in STOCK if f"{name}_training" in TRAINING and not name.startswith(TAKE_PARTS)]


@pytest.mark.parametrize("name", TRAINED)
def test_where_trl_trains_by_a_template_of_its_own_the_answers_are_the_same(name):
    tokenizer = make_stock(name)
    theirs = witness.witness("trl", tokenizer)
    for kind, talk in TALKS.items():
        found, other = outcome(name, kind), theirs(talk)
        if isinstance(found, str) or other is None:
            continue
        pieces, before = [], False
        for id, in_loss in other:
            if in_loss:
                pieces = [*pieces[:-1], [*pieces[-1], id]] if before else [*pieces, [id]]
            before = in_loss
        # Gemma ends a call by a token that is not marked there.
        same = [bare(tokenizer.decode(piece)) for piece in pieces]
        own = [bare(piece).removesuffix("<|tool_response>") for piece in found]
        # Templates for training keep the thoughts of earlier turns.
        skip = kind == "earlier reasoning"
        assert own[skip:] == same[skip:], kind


def test_the_marked_templates_are_what_transformers_says_of_them():
    for name in TRAINING:
        if name.startswith(TAKE_PARTS):
            continue
        tokenizer = make_stock(name)

        def ours(record, name=name):
            document = renderer(name)(check(record))
            return list(zip(document.ids.tolist(), document.mask.tolist(), strict=True))

        found = witness.compare(TALKS.items(), ours, tokenizer, "transformers")
        assert found, f"{name}: {found.difference}"
        assert found.conversations + found.refused + found.unread == len(TALKS)


def test_at_least_38_of_41_stock_templates_are_right_in_chats_of_two_turns(capsys):
    counts: dict[str, collections.Counter[str]] = {}
    for kind in TALKS:
        of_kind = [outcome(name, kind) for name in STOCK]
        counts[kind] = collections.Counter("refused" if isinstance(found, str) else "right" for found in of_kind)
    with capsys.disabled():
        print(f"\n{len(STOCK)} stock chat templates of trl, none silent (the other tests of this file):")
        for kind, count in counts.items():
            print(f"  {kind:24}{count['right']:4} right{count['refused']:4} refused")
    refused = [name for name in STOCK if isinstance(outcome(name, "two turns"), str)]
    assert len(STOCK) - len(refused) >= len(STOCK) - 3, refused
    assert source("qwen3") != source("qwen3_training")


@pytest.mark.parametrize("name", [name for name in names(training=False) if f"{name}_training" in names()])
def test_hf_training_is_the_template_that_trl_trains_by(name):
    stock = load_tokenizer(make_stock(name))
    coder = for_template(stock, "hf-training")
    for back in (coder, pickle.loads(pickle.dumps(coder)), coder.with_special(["<think>"]), coder.for_training()):
        assert back.chat.chat_template == source(f"{name}_training")
    assert stock.chat.chat_template == source(name) and stock.fingerprint() != coder.fingerprint()
    found = verify([TALKS["two turns"]], make_stock(name), template="hf-training", batch_size=1, seq_len=4096)
    assert found, found.difference


def test_hf_training_takes_a_template_that_marks_answers_as_it_is():
    assert for_template(load_tokenizer(make_tokenizer(MARKED)), "hf-training").chat_template() == MARKED


@pytest.mark.parametrize("tokenizer", ["chat32k", make_core(), make_tokenizer(), make_tokenizer(PLAIN)])
def test_hf_training_is_refused_where_trl_has_no_template(tokenizer):
    with pytest.raises(ValueError, match="template='hf-training'"):
        Loader([TALKS["one turn"]], tokenizer, template="hf-training")
