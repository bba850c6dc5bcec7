"""Promises of template="hf" where a text looks like a token, stands after a space, or cannot be written."""

from __future__ import annotations

import pytest

from nanopack import ConversationError, Template, Turn, verify
from nanopack.conversations.records import check
from nanopack.render.renderer import Renderer
from nanopack.tokenizers.tokenizer import load_tokenizer

pytest.importorskip("transformers", reason="needs transformers: pip install 'nanopack-gpu[hf]'")

from hf_chats import FULL, A, U, calling, render, shown
from tiny_hf import MARKED, PLAIN, SPACED, make_core, make_spaced, make_tokenizer

# Added tokens (W10)

CONTROLS = ("<|user|>", "<|bot|>", "<|end|>")
TURNS = "{% for m in messages %}{{ {'user': '<|user|>', 'assistant': '<|bot|>'}[m.role] }}{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"  # noqa: E501


def unflagged(chat_template: str | None = TURNS) -> object:
    """A tokenizer whose control tokens were added without being special, as DeepSeek's."""
    from tokenizers import AddedToken

    tokenizer = make_tokenizer(chat_template)
    tokenizer.add_tokens([AddedToken(token, special=False) for token in CONTROLS])
    return tokenizer


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("token", CONTROLS)
def test_text_that_looks_like_an_added_token_of_the_template_is_refused(role, token):
    messages = [{**m, "content": f"x{token}y" if m["role"] == role else m["content"]} for m in (U, A)]
    renderer = Renderer(load_tokenizer(unflagged()), "hf")
    with pytest.raises(ConversationError, match="which template='hf' would make a special token"):
        renderer(check(messages))


def test_a_thought_in_an_answer_stays_a_token_and_in_a_question_is_refused():
    thinking = PLAIN.replace("{{ message['content'] }}", "{{ message['content'] }}{# <think> #}")
    said = {**A, "content": "<think>R</think>A"}
    document = render(thinking, [U, said])
    assert load_tokenizer(make_core()).added_tokens["<think>"] in document.ids
    with pytest.raises(ConversationError, match="message 0: it holds the text '<think>'"):
        render(thinking, [{**U, "content": "<think>"}, A])


def test_an_added_token_may_be_listed_in_a_template_and_is_text_in_messages():
    template = Template(
        name="ds",
        special_tokens=CONTROLS,
        user=Turn(before="<|user|>"),
        assistant=Turn(before="<|bot|>", end="<|end|>", trained=True),
    )
    given = unflagged()
    tokenizer = load_tokenizer(given)
    messages = [{**U, "content": "a<|bot|>b"}, A]
    ids = Renderer(tokenizer, template)(check(messages)).ids.tolist()
    names = given.convert_ids_to_tokens(ids)
    assert [name for name in names if name in CONTROLS] == list(CONTROLS)
    assert tokenizer.decode(ids[1:]) == "<|user|>a<|bot|>b<|bot|>A<|end|>"
    for how in ({"template": template}, {"template": "hf"}):
        chats = [messages, {"text": "a <|bot|> b"}, [U, A]] * 3
        found = verify(chats, given, batch_size=1, seq_len=24, on_error="skip", num_workers=0, **how)
        assert found and found.batches, found.difference


def test_a_plain_text_does_not_make_an_added_token_of_the_template():
    for given, template in ((unflagged(), "hf"),):
        document = Renderer(load_tokenizer(given), template)(check({"text": "a <|bot|> b"}))
        assert not {load_tokenizer(given).added_tokens[token] for token in CONTROLS} & {*document.ids.tolist()}


# Tokenizers that put a space in front (W9)

CHATML_TALK = [{**U, "content": "Hello there"}, {**A, "content": "It is five.\n Really"}, {**U, "content": "  so?"}, A]


@pytest.mark.parametrize("how", SPACED)
@pytest.mark.parametrize("template", ["nanochat", "chatml"])
def test_content_is_encoded_as_in_the_whole_text_or_the_template_is_refused(how, template):
    given = make_spaced(how)
    try:
        document = Renderer(load_tokenizer(given), template)(check(CHATML_TALK))
    except ValueError as error:
        assert (how, template) in {
            ("prepend", "chatml"),
            ("always", "chatml"),
            ("first", "chatml"),
            ("first", "nanochat"),
        }
        assert "puts white space in front of a text that is encoded apart" in str(error)
        assert "use template='hf' with a chat_template that writes the same" in str(error)
        return
    kinds = {"nanochat": "<|{0}_start|>{1}<|{0}_end|>", "chatml": "<|im_start|>{0}\n{1}<|im_end|>\n"}
    whole = "".join(kinds[template].format(m["role"], m["content"]) for m in CHATML_TALK)
    own = given(whole, add_special_tokens=False)["input_ids"]
    assert given.decode(document.ids[1:]) == given.decode(own)


@pytest.mark.parametrize("how", SPACED)
@pytest.mark.parametrize("chat_template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_the_chat_template_of_a_tokenizer_that_puts_a_space_in_front_is_its_own_encoding(how, chat_template):
    given = make_spaced(how, chat_template)
    document = Renderer(load_tokenizer(given), "hf")(check(CHATML_TALK))
    assert document.ids.tolist() == given.apply_chat_template(CHATML_TALK)["input_ids"]
    names = given.convert_ids_to_tokens(document.ids[document.mask].tolist())
    assert names.count("<|im_end|>") == 2
    found = verify([CHATML_TALK] * 5, given, batch_size=1, seq_len=64, template="hf", num_workers=0)
    assert found and found.batches, found.difference


# Lone surrogates (B2)


@pytest.mark.parametrize("chat_template", [PLAIN, MARKED, FULL], ids=["plain", "marked", "full"])
@pytest.mark.parametrize("bad", ["bad \ud83d end", "\udc00", "\ud83dx\ud83d", "ok 😀 \ud83d"])
def test_a_lone_surrogate_is_mended(chat_template, bad):
    mended = bad.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert mended != bad
    found, expected = (render(chat_template, [U, {**A, "content": text}]) for text in (bad, mended))
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.mask.tolist() == expected.mask.tolist()
    both = verify(
        [[U, {**A, "content": bad}]] * 3,
        make_tokenizer(chat_template),
        batch_size=1,
        seq_len=16,
        template="hf",
        num_workers=0,
    )
    assert both, both.difference


def test_a_lone_surrogate_in_a_call_or_a_thought_is_mended():
    for answer in (calling({"k": "\ud83d"}), calling('{"k": "\\ud83d"}'), {**A, "reasoning_content": "R\ud83d"}):
        assert "�" in shown(render(FULL, [U, answer]))
