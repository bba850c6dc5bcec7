"""Promises of template="hf" where a chat template, a tokenizer or a record is not what one expects."""

from __future__ import annotations

import itertools
import json
import pickle
from datetime import datetime

import numpy as np
import pytest

from nanopack import ConversationError, Loader, Template, Turn, verify
from nanopack.conversations.records import check
from nanopack.render.document import Document
from nanopack.render.renderer import Renderer
from nanopack.tokenizers.tokenizer import load_tokenizer

pytest.importorskip("transformers", reason="needs transformers: pip install 'nanopack-gpu[hf]'")

from tiny_hf import MARKED, PLAIN, PROMPT, SPACED, make_core, make_spaced, make_tokenizer

U = {"role": "user", "content": "Q"}
A = {"role": "assistant", "content": "A"}
# Writes all that a message holds; thoughts of the last turn only.
FULL = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content | trim }}"
    "{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}" + PROMPT
)  # fmt: skip
# Wants arguments as the text that it copies, and looks whether there is a key of that name, as DeepSeek's does.
TEXT_CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if 'tool_calls' in m %}{% for c in m.tool_calls %}"
    "{{ c.type + ' ' + c.function.name + ' ' + c.function.arguments }}{% endfor %}<|end_calls|>"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + PROMPT
)  # fmt: skip
# No token ends an answer but the next header, as in GLM's.
HEADERS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}" + PROMPT
DATED = "{{ strftime_now('%d %b %Y') }}" + PLAIN


def render(chat_template: str, messages: object, *, settings: dict[str, object] | None = None, **others) -> Document:
    tokenizer = load_tokenizer(make_tokenizer(chat_template, **(settings or {})))
    return Renderer(tokenizer, "hf")(check({"messages": messages, **others}))


def shown(document: Document) -> str:
    """The document's text, with [[ ]] around what is in the loss."""
    tokenizer = load_tokenizer(make_core())
    borders = [0, *(np.flatnonzero(np.diff(document.mask)) + 1), len(document.mask)]
    pieces = [(tokenizer.decode(document.ids[a:b]), document.mask[a]) for a, b in itertools.pairwise(borders) if a < b]
    return "".join(f"[[{text}]]" if in_loss else text for text, in_loss in pieces)


def call(arguments: object, name: str = "add") -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calling(arguments: object, **more: object) -> dict[str, object]:
    return {"role": "assistant", "content": "", "tool_calls": [call(arguments)], **more}


# What the template does not write (W5)

LOST = {
    "calls": (PLAIN, [U, calling({"a": "x"})], "message 1: the chat template writes nothing of its tool_calls: 'add'"),
    "arguments": (
        FULL.replace("c.function.arguments", "'x'"),
        [U, calling({"city": "Bonn"})],
        "message 1: the chat template writes nothing of its tool_calls: 'Bonn'",
    ),
    "a number": (
        FULL.replace("c.function.arguments", "'x'"),
        [U, calling({"a": 3})],
        "message 1: the chat template writes nothing of its tool_calls: 3",
    ),
    "a thought": (PLAIN, [U, {**A, "reasoning_content": "R"}], "message 1: the chat template writes nothing of"),
    "a thought that no turn keeps": (
        PLAIN,
        [U, {**A, "thinking": "R"}, U, A],
        "message 1: the chat template writes nothing of its thinking: 'R' is lost",
    ),
    "an earlier content": (
        PLAIN.replace("{{ message['content'] }}", "{% if loop.last %}{{ message['content'] }}{% endif %}"),
        [U, A, U, A],
        "message 0: the chat template writes nothing of its content: 'Q' is lost",
    ),
    "a content next to a call": (
        FULL.replace("{{ m.content | trim }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}"),
        [U, calling({"a": "x"}, content="Let me see.")],
        "message 1: the chat template writes nothing of its content: 'Let me see.'",
    ),
    "the thought in the last content": (
        PLAIN.replace("message['content']", "message['content'].split('</think>')[-1]"),
        [U, {**A, "content": "<think>R</think>A"}],
        "message 1: the chat template writes nothing of its content: 'R' is lost",
    ),
    "a content that is a letter of the role": (
        PLAIN.replace("{{ message['content'] }}", ""),
        [{**U, "content": "user"}],
        "message 0: the chat template writes nothing of its content: 'user' is lost",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOST)
@pytest.mark.parametrize("marked", [False, True], ids=["unmarked", "marked"])
def test_a_message_of_which_the_template_writes_less_is_refused_by_what_is_lost(case, marked):
    chat_template, messages, error = LOST[case]
    if marked:
        chat_template = chat_template.replace("{% for m", "{% generation %}{% endgeneration %}{% for m")
    with pytest.raises(ConversationError) as caught:
        render(chat_template, messages)
    assert str(caught.value).startswith(error)


KEPT = {
    "white space at the ends": (FULL, {**A, "content": " \n A two\n\n"}, "A two"),
    "quotes in arguments": (FULL, calling({"a": 'x "y" \\ é\n'}), '{"a": "x \\"y\\" \\\\ é\\n"}'),
    "numbers": (FULL, calling({"a": 3, "b": -2.5, "c": True, "d": None}), '{"a": 3, "b": -2.5, "c": true, "d": null}'),
    "nested": (FULL, calling({"a": [{"b": ["x", 1]}]}), '{"a": [{"b": ["x", 1]}]}'),
    "nothing": (FULL, calling({}), '"arguments": {}'),
    "a thought": (FULL, {**A, "reasoning_content": "R"}, "<think>R</think>A"),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_is_written_in_another_form_is_not_lost(case):
    chat_template, answer, written = KEPT[case]
    assert written in shown(render(chat_template, [U, answer]))


def test_a_thought_in_an_earlier_content_may_be_left_out_by_a_template_that_keeps_the_last():
    forgets = "message['content'] if loop.last else message['content'].split('</think>')[-1]"
    said = {**A, "content": "<think>\nR\n</think>\n\nA"}
    for chat_template in (PLAIN, MARKED):
        text = shown(render(chat_template.replace("message['content']", forgets), [U, said, U, said]))
        assert text.count("R") == 1
        assert text.count("[[") == 2


@pytest.mark.parametrize("content", ["</think>", "<think> </think>", "<x>"])
def test_a_content_of_brackets_alone_is_checked_too(content):
    silent = MARKED.replace("message['content']", "message['content'] | replace('<x>', '') | replace('</think>', '')")
    with pytest.raises(ConversationError, match=r"writes nothing of its content|would make a special token"):
        render(silent, [{**U, "content": content}, A])


@pytest.mark.parametrize("workers", [0, 2])
def test_thoughts_of_earlier_turns_may_be_left_out_and_are_counted_and_reported_once(workers, caplog):
    thinking = {**A, "reasoning_content": "R"}
    chats = [[U, thinking, U, thinking]] * 3 + [[U, thinking]]
    text = shown(render(FULL, chats[0]))
    assert text.count("R") == 1
    assert text.endswith("[[<think>R</think>A<|im_end|>]]\n")
    how = {"batch_size": 1, "seq_len": 32, "template": "hf", "epochs": 1, "num_workers": workers}
    with Loader(chats, make_tokenizer(FULL), **how) as loader:
        list(loader)
        assert loader.ledger()["ignored_keys"] == {"thought of an earlier turn": 3}
    if not workers:
        assert sum("thought of an earlier turn" in record.message for record in caplog.records) == 1


TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"properties": {"a": {}}}},
}


def test_tools_and_template_variables_reach_the_template_and_are_checked():
    assert "Adds." in shown(render(FULL, [U, A], tools=[TOOL]))
    spoken = "{{ mood }}" + PLAIN
    assert shown(render(spoken, [U, A], chat_template_kwargs={"mood": "calm"})).startswith("calm<|im_start|>")
    for others, error in (
        ({"tools": [TOOL]}, "the tokenizer's chat template does not write its tools"),
        ({"chat_template_kwargs": {"mood": "calm"}}, "chat_template_kwargs has 'mood', which the tokenizer's chat"),
    ):
        with pytest.raises(ConversationError, match=error):
            render(PLAIN, [U, A], **others)


# Calls (W7, W8)


@pytest.mark.parametrize("empty", [[], {}, "", "[]", " [] ", None, ()], ids=repr)
@pytest.mark.parametrize("chat_template", [PLAIN, TEXT_CALLS, FULL, MARKED], ids=["plain", "text", "full", "marked"])
def test_empty_calls_are_absent(chat_template, empty):
    said = shown(render(chat_template, [U, {**A, "tool_calls": empty}]))
    assert (
        said
        == shown(render(chat_template, [U, A]))
        == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n[[A<|im_end|>]]\n"
    )


@pytest.mark.parametrize("template", ["nanochat", "chatml"])
@pytest.mark.parametrize("empty", [[], {}, "", "[]", None], ids=repr)
def test_empty_calls_are_absent_for_other_templates_too(template, empty):
    tokenizer = load_tokenizer("chat32k" if template == "nanochat" else make_core())
    renderer = Renderer(tokenizer, template)
    with_calls, without = (renderer(check([U, answer])) for answer in ({**A, "tool_calls": empty}, A))
    assert with_calls.ids.tolist() == without.ids.tolist()


ARGUMENTS = [{"a": 1, "b": "x é"}, {}, {"deep": {"list": [1, "two"]}}]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=repr)
@pytest.mark.parametrize("chat_template", [FULL, TEXT_CALLS], ids=["wants a mapping", "wants text"])
def test_arguments_in_wire_form_are_those_of_a_mapping(chat_template, arguments):
    wire = json.dumps(arguments, ensure_ascii=False)
    whole = json.dumps([call(wire)])
    forms = [calling(arguments), calling(wire), {**calling({}), "tool_calls": whole}]
    texts = {shown(render(chat_template, [U, form])) for form in forms}
    assert len(texts) == 1
    assert wire in texts.pop()


BAD_CALLS = {
    "letters": ("add(1)", "message 1: tool_calls is text that is not JSON"),
    "a dict": ({"function": {"name": "f"}}, "message 1: tool_calls must be a list of dicts, or JSON text of one"),
    "no name": ([{"function": {"arguments": {}}}], "message 1: tool_calls[0] is {'function': {'arguments': {}}};"),
    "strings": (["add"], "message 1: tool_calls"),
    "arguments that are no JSON": ([call("a=1")], "message 1: tool_calls[0]: arguments is the text 'a=1', which"),
    "arguments that are a list": ([call("[1]")], "message 1: tool_calls[0]: arguments must be a dict or the JSON of"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_calls_that_are_none_are_refused(case):
    calls, error = BAD_CALLS[case]
    with pytest.raises(ConversationError) as caught:
        render(FULL, [U, {**A, "tool_calls": calls}])
    assert str(caught.value).startswith(error)


# The token that ends an answer (W11)


def test_an_answer_without_the_token_that_ends_it_is_refused():
    for messages in ([U, A], [U, A, U, A]):
        with pytest.raises(
            ConversationError, match="message 1: the chat template writes no special token that ends it"
        ):
            render(HEADERS, messages)


def test_the_next_header_is_in_the_loss_where_it_is_a_stop_token():
    settings = {"eos_token": "<|im_start|>"}
    said = shown(render(HEADERS, [U, A, U], settings=settings))
    assert said == "<|im_start|>user\nQ<|im_start|>assistant\n[[A<|im_start|>]]user\nQ"
    with pytest.raises(ConversationError, match="message 3: the chat template writes no special token that ends it"):
        render(HEADERS, [U, A, U, A], settings=settings)


def test_marks_that_leave_the_end_out_are_refused():
    outside = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    with pytest.raises(ConversationError, match="'A' would be in the loss without the special token that ends it"):
        render(outside, [U, A])


FORGETFUL_TALKS = {
    "the end comes after the last message": (
        PLAIN.replace("{% endif %}", "{% else %}<|endoftext|>{% endif %}"),
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n[[A<|im_end|>]]\n<|im_start|>user\nQ<|im_end|>\n"
        "<|im_start|>assistant\n[[B<|im_end|>\n<|endoftext|>]]",
    ),
    "another token ends the last": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{{ '<|endoftext|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}" + PROMPT,
        "<|im_start|>user\nQ<|im_end|><|im_start|>assistant\n[[A<|im_end|>]]<|im_start|>user\nQ<|im_end|>"
        "<|im_start|>assistant\n[[B<|endoftext|>]]",
    ),
    "only the last keeps a thought": (
        PLAIN.replace("{{ message['content'] }}", "{% if loop.last and message.role == 'assistant' %}<think></think>"
        "{% endif %}{{ message['content'] }}"),
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n[[A<|im_end|>]]\n<|im_start|>user\nQ<|im_end|>\n"
        "<|im_start|>assistant\n[[<think></think>B<|im_end|>]]\n",
    ),
    "the prompt begins a thought": (
        PLAIN.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n{% endif"),
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n[[A<|im_end|>]]\n<|im_start|>user\nQ<|im_end|>\n"
        "<|im_start|>assistant\n[[B<|im_end|>]]\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGETFUL_TALKS)
def test_answers_are_found_in_the_text_of_all_messages(case):
    chat_template, expected = FORGETFUL_TALKS[case]
    assert shown(render(chat_template, [U, A, U, {**A, "content": "B"}])) == expected


def test_a_template_whose_writing_cannot_be_followed_is_refused():
    looks = PLAIN.replace("<|im_end|>", "{% if message['content'] == 'aloud' %}!{% endif %}<|im_end|>")
    with pytest.raises(ConversationError, match="what is in the loss cannot be found in its text; give the tokenizer"):
        render(looks, [U, {**A, "content": "aloud"}])


def test_a_refusal_names_the_template_for_training_that_trl_has():
    stock = pytest.importorskip("stock_templates")
    if stock.folder() is None:
        pytest.skip("needs trl: pip install trl")
    renderer = Renderer(load_tokenizer(stock.make_stock("glm4moe")), "hf")
    with pytest.raises(ConversationError, match="; template='hf-training' is the one that trl trains by in its place"):
        renderer(check([U, A]))


# What is not to be in the loss


@pytest.mark.parametrize("chat_template", [PLAIN, MARKED, FULL], ids=["plain", "marked", "full"])
def test_a_message_that_is_not_to_be_learnt_has_no_token_in_the_loss(chat_template):
    document = render(
        chat_template, [U, {**A, "content": "BAD", "weight": 0}, U, {**A, "content": "GOOD", "weight": 1}]
    )
    assert shown(document).count("[[") == 1
    assert "[[GOOD<|im_end|>]]" in shown(document)


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


# The date that a template writes (W12)


def at(day: str) -> object:
    tokenizer = load_tokenizer(make_tokenizer(DATED))
    return tokenizer.at(f"{day}T23:59:58")


def batches(loader: Loader, count: int) -> list[list[int]]:
    return [next(loader).inputs.flatten().tolist() for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("packing", ["best_fit", "stream"])
def test_a_run_goes_on_with_the_date_that_it_began_with(packing, workers):
    chats = [[U, {**A, "content": "x" * (number % 17)}] for number in range(40)]
    how = {"batch_size": 2, "seq_len": 48, "template": "hf", "num_workers": workers, "packing": packing}
    with Loader(chats, at("2025-12-09"), **how) as loader:
        batches(loader, 3)
        state = json.loads(json.dumps(loader.state_dict()))
        expected = batches(loader, 6)
        assert "09 Dec 2025" in loader.tokenizer.decode(expected[0] + expected[1])
    with Loader(chats, at("2025-12-10"), **how) as loader:
        loader.load_state_dict(state)
        assert batches(loader, 6) == expected
        assert loader.state_dict()["fingerprint"] == state["fingerprint"]


def test_a_date_is_fixed_when_the_tokenizer_is_loaded(monkeypatch):
    import transformers.utils.chat_template_utils as of_transformers

    tokenizer = load_tokenizer(make_tokenizer(DATED))
    renderer, before = Renderer(tokenizer, "hf"), Renderer(tokenizer, "hf")(check([U, A])).ids.tolist()

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2099, 1, 1)

    monkeypatch.setattr(of_transformers, "datetime", Tomorrow)
    for again in (renderer, Renderer(pickle.loads(pickle.dumps(tokenizer)), "hf")):
        assert again(check([U, A])).ids.tolist() == before


def test_the_date_is_part_of_the_fingerprint_and_other_templates_have_none():
    days = [at(day).fingerprint() for day in ("2025-12-09", "2025-12-09", "2025-12-10")]
    assert days[0] == days[1] != days[2]
    assert load_tokenizer(make_tokenizer(PLAIN)).clock is None


def test_a_refused_state_leaves_the_date_as_it_is():
    how = {"batch_size": 1, "seq_len": 48, "template": "hf", "num_workers": 0}
    with Loader([[U, A]] * 9, at("2025-12-09"), **how) as loader:
        state = loader.state_dict()
    with Loader([[U, A]] * 8, at("2025-12-10"), **how) as loader:
        with pytest.raises(ValueError, match="conversations were 9, are 8"):
            loader.load_state_dict(state)
        assert "10 Dec 2025" in loader.tokenizer.decode(next(loader).inputs[0].tolist())


def test_a_date_whose_format_is_computed_is_refused():
    computed = "{% set f = '%d' + '%m' %}{{ strftime_now(f) }}" + PLAIN
    with pytest.raises(ValueError, match="its chat template computes the format of the date that it writes"):
        Renderer(load_tokenizer(make_tokenizer(computed)), "hf")


def test_a_date_that_a_record_gives_is_written():
    dated = "{% if date_string is not defined %}{% set date_string = strftime_now('%Y') %}{% endif %}{{ date_string }}"
    said = shown(render(dated + PLAIN, [U, A], chat_template_kwargs={"date_string": "26 Jul 2024"}))
    assert said.startswith("26 Jul 2024<|im_start|>")


def test_a_flag_that_the_template_does_not_read_is_refused():
    for chat_template in (PLAIN, MARKED):
        talk = [U, {**A, "prefix": True}]
        with pytest.raises(ConversationError, match="message 1: the chat template does not read its prefix, True"):
            render(chat_template, talk)
        assert verify(
            [talk, [U, A]], make_tokenizer(chat_template), batch_size=1, seq_len=32, template="hf", on_error="skip"
        )
        reads = "{% if false and messages[0].prefix %}{% endif %}" + chat_template
        assert shown(render(reads, talk)) == shown(render(chat_template, [U, A]))
        assert shown(render(chat_template, [U, {**A, "prefix": False}])) == shown(render(chat_template, [U, A]))


def test_a_record_of_weight_0_is_not_in_the_loss():
    for chat_template in (PLAIN, MARKED):
        assert "[[" in shown(render(chat_template, [U, A], weight=1))
        assert "[[" not in shown(render(chat_template, [U, A], weight=0))
