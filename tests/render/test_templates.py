"""Promises of nanopack/render/templates.py, and of batches by each template: they are the reference packer's."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import pickle
from importlib import resources

import pytest
from data_sets import SHIPPED

from nanopack import Loader, Template, Turn, verify
from nanopack.config import LoaderConfig
from nanopack.conversations.records import Conversation, Message
from nanopack.errors import ConversationError
from nanopack.render.renderer import Renderer
from nanopack.render.templates import CHATML, LLAMA3
from nanopack.tokenizers.tokenizer import Tokenizer, from_ranks, load_tokenizer

DATA = resources.files("nanopack") / "data"
SPECIAL_TOKENS = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}
PATTERN = load_tokenizer("chat32k").encoding._pat_str


def tokenizer_with(special_tokens: list[str]) -> Tokenizer:
    return from_ranks(str(DATA / "chat32k.tiktoken"), pattern=PATTERN, special_tokens=special_tokens)


def shipped(count: int) -> list[dict]:
    """Shipped conversations whose contents are all strings."""
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    plain = [r for r in records if all(isinstance(m["content"], str) for m in r.get("messages", []))]
    return plain[:count]


EDGES = [
    {"messages": [{"role": "user", "content": "  <|eot_id|><|im_end|> "}, {"role": "assistant", "content": "\n"}]},
    {"messages": [{"role": "assistant", "content": "\u00a0a\u2028"}, {"role": "system", "content": ""}]},
    {"messages": [{"role": "assistant", "content": "call"}, {"role": "ipython", "content": " 7 "}]},
    {"conversations": [{"from": "function_call", "value": "f()"}, {"from": "observation", "value": "8"}]},
    {"conversations": [{"from": "tool", "value": ""}, {"from": "gpt", "value": "9"}]},
    {"text": " plain <|im_start|>text "},
]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("template", ["chatml", "llama3"])
def test_batches_by_a_named_template_are_the_reference_packers(template, workers):
    arguments = {"batch_size": 4, "seq_len": 256, "loss_weights": "token", "num_workers": workers}
    tokenizer = tokenizer_with(SPECIAL_TOKENS[template])
    found = verify([*EDGES, *shipped(60)], tokenizer, template=template, **arguments)
    assert found, found.difference
    assert found.tokens > 5000


# Templates of one's own

GEMMA = Template(
    name="gemma",
    special_tokens=("<start>", "<end>"),
    system=Turn(after="\n\n"),
    user=Turn(before="<start>user\n", end="<end>", after="\n"),
    assistant=Turn(before="<start>model\n", end="<end>", after="\n", trained=True),
    merge_system=True,
    strip=True,
)
LLAMA2 = Template(
    name="llama2",
    special_tokens=("<s>", "</s>"),
    system=Turn(before="<<SYS>>\n", after="\n<</SYS>>\n\n"),
    user=Turn(before="<s>[INST] ", after=" [/INST]"),
    assistant=Turn(before=" ", end=" </s>", trained=True),
    merge_system=True,
)
LLAMA2_TEXT = "<<SYS>>\ns\n<</SYS>>\n\nu"
# One special token begins like another and two stand together; an end that is not trained, a user that is.
ODD = Template(
    name="odd",
    special_tokens=("<aq", "<aq>", "<b>"),
    user=Turn(before="<aq><b>", end="<b>x<aq", trained=True),
    assistant=Turn(after="<b><b>", trained=True),
    tool=Turn(before="", end="", after=""),
)
OWN = {template.name: template for template in (GEMMA, LLAMA2, ODD, CHATML, LLAMA3)}
OWN_TOKENIZER = tokenizer_with(
    ["<|bos|>", *dict.fromkeys(token for template in OWN.values() for token in template.special_tokens)]
)
STARTS = [
    {"messages": [{"role": "system", "content": " s "}, *shipped(1)[0]["messages"]]},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": " <b><aq> "}]},
    {"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "refused where merged"}]},
    {"messages": [{"role": "user", "content": "u"}, {"role": "system", "content": "refused where merged"}]},
    {"messages": [{"role": "system", "content": "refused where merged"}]},
]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", OWN)
def test_batches_by_a_template_of_ones_own_are_the_reference_packers(name, workers):
    arguments = {"batch_size": 4, "seq_len": 256, "loss_weights": "token", "num_workers": workers, "on_error": "skip"}
    found = verify([*EDGES, *STARTS, *shipped(60)], OWN_TOKENIZER, template=OWN[name], **arguments)
    assert found, found.difference
    assert found.tokens > 3000


def document_of(template: Template, *messages: tuple[str, str]) -> list[tuple[str, int]]:
    """The tokens of a document, those of equal mask together, special tokens alone."""
    render = Renderer(OWN_TOKENIZER, template)
    document = render(Conversation(tuple([Message(*message) for message in messages])))
    first_special = OWN_TOKENIZER.bos_id
    runs: list[tuple[str, int]] = []
    joins = False
    for token_id, trained in zip(document.ids.tolist(), document.mask.tolist(), strict=True):
        text = OWN_TOKENIZER.decode([token_id])
        if joins and token_id < first_special and runs[-1][1] == trained:
            runs[-1] = (runs[-1][0] + text, int(trained))
        else:
            runs.append((text, int(trained)))
        joins = token_id < first_special
    return runs


def test_a_system_message_that_is_merged_is_one_text_with_the_users():
    assert document_of(GEMMA, ("system", "Be brief. "), ("user", " Hi"), ("assistant", "Hello\n")) == [
        ("<|bos|>", 0),
        ("<start>", 0),
        ("user\nBe brief.\n\nHi", 0),
        ("<end>", 0),
        ("\n", 0),
        ("<start>", 0),
        ("model\n", 0),
        ("Hello", 1),
        ("<end>", 1),
        ("\n", 0),
    ]
    document = Renderer(OWN_TOKENIZER, LLAMA2)(Conversation((Message("system", "s"), Message("user", "u"))))
    before, text, after = (OWN_TOKENIZER.encode(text).tolist() for text in ("[INST] ", LLAMA2_TEXT, " [/INST]"))
    assert document.ids.tolist() == [OWN_TOKENIZER.bos_id, OWN_TOKENIZER.special_id("<s>"), *before, *text, *after]
    assert document.starts == (1, 1)


def test_special_tokens_are_found_longest_first_and_what_is_trained_is_the_turns_own():
    assert document_of(ODD, ("user", "<aq>"), ("tool", "t"), ("assistant", "")) == [
        ("<|bos|>", 0),
        ("<aq>", 0),
        ("<b>", 0),
        ("<aq>", 1),
        ("<b>", 1),
        ("x", 1),
        ("<aq", 1),
        ("t", 0),
        ("<b>", 0),
        ("<b>", 0),
    ]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        pytest.param([("tool", "t")], "message 0: role is 'tool'; template='gemma' has system, user", id="no-tool"),
        pytest.param([("user", ""), ("system", "")], "message 1: role is 'system'; only message 0 may be", id="late"),
        pytest.param([("system", "")], "message 0: role is 'system' and no message follows", id="alone"),
        pytest.param([("system", ""), ("assistant", "")], "message 1: role is 'assistant' where", id="no-user"),
    ],
)
def test_what_a_template_of_ones_own_has_no_place_for_is_an_error(messages, error):
    with pytest.raises(ConversationError, match=error):
        document_of(GEMMA, *messages)


def changed(**fields: object) -> Template:
    return dataclasses.replace(GEMMA, **fields)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"name": ""}, "Template name='' is not allowed"),
        ({"name": 3}, "Template name=3 is not allowed"),
        ({"strip": 1}, "Template 'gemma': strip=1 is not allowed; use True or False"),
        ({"merge_system": None}, "Template 'gemma': merge_system=None is not allowed; use True or False"),
        ({"special_tokens": "<start>"}, "Template 'gemma': special_tokens='<start>' is not allowed; use a tuple"),
        ({"special_tokens": ("<start>", "")}, "special_tokens=('<start>', '') is not allowed"),
        ({"user": None}, "user=None is not allowed; use a nanopack.Turn"),
        ({"tool": "<start>"}, "tool='<start>' is not allowed; use a nanopack.Turn, or None"),
        ({"user": Turn(before=None)}, "before, end and after are strings"),
        ({"user": Turn(trained="yes")}, "trained is True or False"),
        ({"system": None}, "merge_system=True is not allowed with system=None; give a Turn"),
        ({"system": Turn(end="x")}, "give a Turn that has only before and after"),
        ({"system": Turn(trained=True)}, "give a Turn that has only before and after"),
        ({"system": Turn(after="<end>")}, "'<end>' in system is inside the user's text, which is encoded as ordinary"),
    ],
    ids=str,
)
def test_a_template_that_cannot_be_is_refused_when_it_is_made(fields, error):
    with pytest.raises(ValueError) as raised:
        changed(**fields)
    assert error in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        pytest.param({"special_tokens": ("<start>", "<end>", "<x>")}, "lacks special .*'gemma': <x>", id="lacks"),
        pytest.param({"special_tokens": ("<start>",)}, "'<end>' holds '<end>', .* list it", id="unlisted"),
    ],
)
def test_a_template_that_does_not_go_with_the_tokenizer_is_refused_by_the_loader(fields, error):
    with pytest.raises(ValueError, match=error):
        Loader(shipped(1), OWN_TOKENIZER, template=changed(**fields))


def test_a_template_crosses_a_process_boundary():
    config = pickle.loads(pickle.dumps(LoaderConfig(template=GEMMA)))
    assert config.template == GEMMA
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(dataclasses.replace, (GEMMA,), {"name": "back"}) == changed(name="back")


def test_an_explanation_calls_a_template_by_its_name():
    with Loader(shipped(1), OWN_TOKENIZER, 1, 64, template=GEMMA, num_workers=0) as loader:
        batch = next(loader)
        row = batch.targets[0].tolist()
        trained = next(col for col, target in enumerate(row) if target != -100)
        assert "template 'gemma' puts this part of the assistant's message in the loss" in str(
            loader.explain(batch, 0, trained)
        )
        assert "template 'gemma' keeps what the user says out of the loss" in str(loader.explain(batch, 0, 1))


@pytest.mark.parametrize("tokens", [None, 5, {"<|im_end|>"}, "<|im_end|>", (token for token in ["<|im_end|>"])])
def test_special_tokens_are_a_tuple_or_a_list_and_nothing_that_is_gone_when_looked_at(tokens):
    with pytest.raises(ValueError, match=r"special_tokens=.* is not allowed; use a tuple of strings"):
        Template(name="t", special_tokens=tokens, user=Turn("U:"), assistant=Turn("A:", trained=True))


def test_a_turn_of_the_user_in_the_loss_is_explained_as_the_users():
    template = Template(name="both", special_tokens=(), user=Turn("U:", trained=True), assistant=Turn("A:"))
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    with Loader([chat], "chat32k", 1, 8, template=template, epochs=1, num_workers=0) as loader:
        batch = next(loader)
        reasons = {loader.explain(batch, 0, column).reason for column in range(8)}
    assert "template 'both' puts this part of the user's message in the loss" in reasons
    assert not any("assistant's message in the loss" in reason for reason in reasons)
