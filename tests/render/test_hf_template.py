"""Promises of nanopack/render/hf_template.py: template="hf" is the tokenizer's own chat template, mask included."""

from __future__ import annotations

import numpy as np
import pytest
from covering import each

from nanopack import ConversationError, Loader, verify
from nanopack.conversations.records import check
from nanopack.render.document import Document
from nanopack.render.renderer import Renderer
from nanopack.tokenizers.tokenizer import load_tokenizer

pytest.importorskip("transformers", reason="needs transformers: pip install 'nanopack-gpu[hf]'")

from tiny_hf import CALLS, FORGETFUL, MARKED, PLAIN, make_core, make_tokenizer, shipped

SYSTEM, USER, ANSWER = (
    {"role": role, "content": text} for role, text in (("system", "Be."), ("user", "Hi"), ("assistant", "Oh\n\n  no"))
)
TALK = {"messages": [SYSTEM, USER, ANSWER, USER, {"role": "assistant", "content": "naïve 😀"}]}


def render(chat_template: str, record: object) -> Document:
    return Renderer(load_tokenizer(make_tokenizer(chat_template)), "hf")(check(record))


def trained_text(document: Document) -> list[str]:
    """The stretches that are trained."""
    borders = np.flatnonzero(np.diff(document.mask, prepend=False, append=False))
    tokenizer = load_tokenizer(make_core())
    return [tokenizer.decode(document.ids[a:b]) for a, b in borders.reshape(-1, 2)]


@pytest.mark.parametrize("chat_template", [MARKED, PLAIN], ids=["marked", "by-prefixes"])
def test_ids_are_those_of_apply_chat_template_and_answers_with_their_end_are_trained(chat_template):
    document = render(chat_template, TALK)
    assert document.ids.tolist() == make_tokenizer(chat_template).apply_chat_template(TALK["messages"])["input_ids"]
    assert trained_text(document) == ["Oh\n\n  no<|im_end|>", "naïve 😀<|im_end|>"]
    assert (document.ids.dtype, document.mask.dtype, document.starts) == (np.uint32, np.bool_, ())


def test_both_ways_and_the_chatml_template_agree_on_the_shipped_conversations():
    tokenizer = load_tokenizer(make_tokenizer(MARKED))
    render_marked, render_plain = (Renderer(load_tokenizer(make_tokenizer(one)), "hf") for one in (MARKED, PLAIN))
    for record in shipped(50):
        # ChatML encodes a content apart from the newline before it; white space there would make a difference.
        messages = [{**m, "content": m["content"].strip()} for m in record["messages"]]
        marked, plain = render_marked(check(messages)), render_plain(check(messages))
        chatml = Renderer(tokenizer, "chatml")(check(messages))
        assert marked.ids.tolist() == plain.ids.tolist() == chatml.ids.tolist()[1:]
        assert marked.mask.tolist() == plain.mask.tolist() == chatml.mask.tolist()[1:]


def test_plain_text_is_bos_and_text_all_trained():
    document = render(MARKED, {"text": "Hi <|im_end|>"})
    tokenizer = load_tokenizer(make_core())
    assert document.ids.tolist() == [tokenizer.bos_id, *tokenizer.encode("Hi <|im_end|>").tolist()]
    assert document.mask.all()


def test_calls_of_tools_reach_the_template():
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    document = render(CALLS, [USER, call, {"role": "tool", "content": "7"}])
    assert trained_text(document) == ["add<|im_end|>"]


BAD = {
    "special text": (PLAIN, [USER | {"content": "a<|im_end|>"}], "message 0: it holds the text '<|im_end|>', which"),
    "special text in a call": (
        CALLS,
        [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "<|im_start|>"}}]}],
        "message 1: it holds the text '<|im_start|>', which template='hf' would make a special token",
    ),
    "parts": (
        PLAIN,
        [{"role": "user", "content": [{"type": "python", "text": "x"}]}],
        "message 0: content has parts that are not text",
    ),
    "refused by the template": (CALLS, [SYSTEM], "the tokenizer's chat template refuses it: TemplateError: user first"),
    "no end": (
        PLAIN.replace("<|im_end|>", ""),
        TALK,
        "message 2: the chat template writes no special token that ends it, so the model would not stop; give the "
        "tokenizer a chat_template with {% generation %}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_rendered_is_an_error_that_says_what_to_do(case):
    chat_template, record, error = BAD[case]
    with pytest.raises(ConversationError) as caught:
        render(chat_template, record)
    assert str(caught.value).startswith(error)
    assert not str(caught.value).endswith(".")


@pytest.mark.parametrize("template", ["nanochat", "chatml"])
def test_other_templates_refuse_calls_of_tools(template):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}
    tokenizer = "chat32k" if template == "nanochat" else make_core()
    with pytest.raises(ConversationError, match="message 1: it has tool_calls, which only template='hf' writes"):
        Renderer(load_tokenizer(tokenizer), template)(check([USER, call]))


@pytest.mark.parametrize(
    "tokenizer", ["chat32k", make_core(), make_tokenizer()], ids=["tiktoken", "tokenizers", "without-one"]
)
def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"template='hf' is the chat template of a transformers tokenizer, and .* has"):
        Loader([TALK], tokenizer, template="hf")


TEMPLATES = {"marked": MARKED, "plain": PLAIN, "forgetful": FORGETFUL, "calls": CALLS}


@pytest.mark.parametrize(("chat_template", "workers"), each(TEMPLATES, [0, 1, 2]))
def test_batches_are_the_reference_packers(chat_template, workers):
    bad = [{"messages": record} if isinstance(record, list) else record for _, record, _ in BAD.values()]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    arguments = {
        "batch_size": 2,
        "seq_len": 128,
        "loss_weights": "conversation",
        "on_error": "skip",
        "num_workers": workers,
    }
    edges = [TALK, {"text": "Hi"}, {"messages": [USER, call, {"role": "ipython", "content": "7"}]}, *bad]
    found = verify([*edges, *shipped(30)], make_tokenizer(chat_template), template="hf", **arguments)
    assert found, found.difference
    assert found.tokens > 300


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loss", ["assistant", "all"])
@pytest.mark.parametrize("packing", ["best_fit", "best_fit_pad", "stream"])
def test_messages_of_which_the_template_makes_nothing_are_skipped_wherever_they_stand(packing, loss, workers):
    bare = "{% for m in messages %}{% if m['content'] %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    empty = {"messages": [{**USER, "content": ""}, {**ANSWER, "content": ""}]}
    chats = [empty, TALK, empty, empty, {"text": "Hi"}, {"text": ""}, empty]
    how = {"template": "hf", "packing": packing, "loss": loss, "num_workers": workers}
    found = verify(chats, make_tokenizer(bare), batch_size=1, seq_len=16, on_error="skip", **how)
    assert found and found.batches, found.difference
    with (
        Loader(chats, make_tokenizer(bare), 1, 16, **how) as loader,
        pytest.raises(ConversationError, match="0, the tokenizer's chat template writes nothing for it"),
    ):
        next(loader)


def test_an_explanation_names_the_template():
    with Loader([TALK], make_tokenizer(MARKED), 1, 64, template="hf", num_workers=0) as loader:
        batch = next(loader)
        trained = next(col for col, target in enumerate(batch.targets[0].tolist()) if target != -100)
        assert ": in the loss, template 'hf' puts this token in the loss" in str(loader.explain(batch, 0, trained))
        assert "not in the loss, template 'hf' keeps this token out of the loss" in str(loader.explain(batch, 0, 0))
