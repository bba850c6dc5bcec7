"""Promises of template="hf" where a chat template or a record is not what one expects."""

from __future__ import annotations

import json

import pytest

from nanopack import ConversationError, Loader, verify
from nanopack.conversations.records import check
from nanopack.render.renderer import Renderer
from nanopack.tokenizers.tokenizer import load_tokenizer

pytest.importorskip("transformers", reason="needs transformers: pip install 'nanopack-gpu[hf]'")

from hf_chats import FULL, HEADERS, TEXT_CALLS, A, U, call, calling, render, shown
from tiny_hf import MARKED, PLAIN, PROMPT, make_core, make_tokenizer

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


@pytest.mark.parametrize("roles", [("model", "assistant"), ("assistant", "model"), ("Answer:", "The answer:")])
def test_an_answer_under_another_role_than_it_is_asked_for_is_refused(roles):
    says, asks = roles
    header = "{{ {'assistant': 'ROLE'}.get(message['role'], 'user') }}".replace("ROLE", says)
    template = PLAIN.replace("{{ message['role'] }}", header)
    with pytest.raises(ConversationError, match="message 1: the chat template begins it in another way than it asks"):
        render(template.replace(PROMPT, PROMPT.replace("assistant", asks)), [U, A])


def test_a_prompt_may_begin_a_thought_that_an_answer_leaves_out():
    for begins in ("<think>\n", "[THINK]", "thought\n"):
        asks = PROMPT.replace("assistant\n", f"assistant\n{begins}")
        said = PLAIN.replace(
            "{{ message['content'] }}", "{{ 'So: ' if message['role'] == 'assistant' }}{{ message['content'] }}"
        )
        assert "[[So: A<|im_end|>]]" in shown(render(said.replace(PROMPT, asks), [U, A]))


@pytest.mark.parametrize(
    ("begins", "frame"),
    [
        ("<think>\n", "<answer>"),
        ("<|START_THINKING|>", "<|START_TEXT|>"),
        ("[THINK]", "[TEXT]"),
        ("<t><think>", "<t><x>"),
    ],
)
def test_a_letter_that_an_answer_shares_with_the_bracket_of_a_thought_is_in_the_loss(begins, frame):
    said = PLAIN.replace(
        "{{ message['content'] }}", f"{{{{ '{frame}' if message.role == 'assistant' }}}}{{{{ message.content }}}}"
    )
    template = said.replace(PROMPT, PROMPT.replace("assistant\n", f"assistant\n{begins}"))
    assert f"[[{frame.removeprefix('<t>')}A<|im_end|>]]" in shown(render(template, [U, A]))
    assert verify([[U, A]], make_tokenizer(template), batch_size=1, seq_len=64, template="hf").batches == 1


def test_a_prompt_that_says_what_no_answer_begins_with_is_refused():
    template = PLAIN.replace(PROMPT, PROMPT.replace("assistant\n", "assistant\nHere are my steps:"))
    with pytest.raises(ConversationError, match="message 1: the chat template begins it in another way than it asks"):
        render(template, [U, A])
    options = {"batch_size": 1, "seq_len": 64, "template": "hf", "on_error": "skip"}
    assert verify([[U, A]], make_tokenizer(template), **options).batches == 0


@pytest.mark.parametrize("written", ["", " | tojson", " | tojson(separators=(',', ':'))"])
def test_a_template_that_would_write_lists_as_they_stand_is_given_no_parts(written):
    lists = "message['content']" + written + " if message['content'] is not string else ''"
    with pytest.raises(ConversationError, match="message 0: the chat template writes nothing of its content"):
        render(PLAIN.replace("message['content']", lists), [U, A])


@pytest.mark.parametrize("own", ["Any type.", "Say 'type'.", 'Write {"type": "text"}.'])
def test_a_template_that_wants_parts_may_say_type_in_its_own_text(own):
    wants = "{% for part in message['content'] if part.type == 'text' %}{{ part.text }}{% endfor %}"
    template = own + PLAIN.replace("{{ message['content'] }}", wants)
    assert shown(render(template, [U, A])).endswith("<|im_start|>assistant\n[[A<|im_end|>]]\n")
    options = {"batch_size": 1, "seq_len": 64, "template": "hf", "packing": "best_fit_pad"}
    assert verify([[U, A]], make_tokenizer(template), **options).batches == 1


def test_a_template_that_reverses_what_it_is_given_is_refused():
    reverses = PLAIN.replace("['content']", "['content'][::-1]")
    with pytest.raises(ConversationError, match="message 0: the chat template writes nothing of its content: 'Q' is"):
        render(reverses, [U, A])
    options = {"batch_size": 1, "seq_len": 32, "template": "hf", "on_error": "skip"}
    assert verify([[U, A], [{**U, "content": "long"}, A]], make_tokenizer(reverses), **options).batches == 0


@pytest.mark.parametrize("chat_template", [PLAIN, MARKED, FULL], ids=["plain", "marked", "full"])
def test_special_tokens_of_the_template_are_tokens_where_the_tokenizer_is_set_to_split_them(chat_template):
    splits, plain = (make_tokenizer(chat_template, split_special_tokens=one) for one in (True, False))
    for template in ("hf", "chatml"):
        options = {"batch_size": 1, "seq_len": 32, "template": template, "packing": "best_fit_pad"}
        assert verify([[U, A]], splits, **options).batches == 1
        with Loader([[U, A]], splits, **options) as loader, Loader([[U, A]], plain, **options) as as_others:
            assert next(loader).inputs.tolist() == next(as_others).inputs.tolist()


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
