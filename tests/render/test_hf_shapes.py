"""Promises of hf_shapes.py and hf_watch(ed).py: a template runs once a shape, if its text depends on no content."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopack import EncoderError, Loader, verify
from nanopack.conversations.records import check
from nanopack.errors import ConversationError
from nanopack.render import hf_shapes, hf_template
from nanopack.render.document import Document, Plan
from nanopack.render.renderer import Renderer
from nanopack.tokenizers.tokenizer import load_tokenizer

pytest.importorskip("transformers", reason="needs transformers: pip install 'nanopack-gpu[hf]'")

from fuzz_texts import PIECES
from stock_templates import make_stock, names
from tiny_hf import MARKED, PLAIN, PROMPT, make_core, make_tokenizer, shipped


def renderer(chat_template: str) -> Renderer:
    return Renderer(load_tokenizer(make_tokenizer(chat_template)), "hf")


def talk(*contents: str) -> dict[str, object]:
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]}


def runs_of_the_template(one: Renderer, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return a list that grows by what the template is given, each time that it is run."""
    runs: list[object] = []
    written = one._encode_chat._written
    monkeypatch.setattr(one._encode_chat, "_written", lambda chat: (runs.append(chat), written(chat))[1])
    return runs


@pytest.mark.parametrize("chat_template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_the_template_runs_once_for_conversations_of_one_shape(chat_template, monkeypatch):
    one = renderer(chat_template)
    runs = runs_of_the_template(one, monkeypatch)
    for number in range(5):
        plan = one.plan(check(talk(f"question {number}", f"answer\n\n{number} 😀")))
        assert isinstance(plan, Plan)
        assert (plan.expected is None) == (number > 0)
        one.fill_in([plan])
    assert len(runs) == 1
    one.plan(check(talk("a", " b")))
    assert len(runs) == 2


@pytest.mark.parametrize("text", ["a<|im_end|>", "<think>b", " ", "\ud800"])
def test_what_a_content_must_not_hold_is_left_to_the_template(text, monkeypatch):
    one = renderer(PLAIN)
    one.plan(check(talk("a", "b")))
    runs = runs_of_the_template(one, monkeypatch)
    try:
        one(check(talk("a", text)))
    except ConversationError as error:
        assert text == "a<|im_end|>" and "'<|im_end|>'" in str(error)
    assert len(runs) == 1


SAYS = "{{ '<|im_start|>' + message['role'] + '\n' }}"
END = "{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT
C = "message['content']"
# What a template does with a content, and whether its text depends on the content by that.
DOES = {
    "writes it": (f"{{{{ {C} }}}}", False),
    "strips it": (f"{{{{ ({C} | trim).strip() }}}}", False),
    "joins it": (f"{{{{ 'so: ' + {C} ~ '.' }}}}", False),
    "looks for a text": (f"{{% if '[x]' in {C} %}}x{{% endif %}}{{{{ {C} }}}}", False),
    "splits it by a text": (f"{{{{ {C}.split('[x]')[-1].lstrip('\n') }}}}", False),
    "asks what it is": (f"{{% if {C} is string and {C} %}}{{{{ {C} }}}}{{% endif %}}", False),
    "sets it in a block": (f"{{% set c %}}{{{{ {C} }}}}{{% endset %}}{{{{ c }}}}", False),
    "gives it to a macro": (f"{{% macro m(c) %}}{{{{ c }}}}{{% endmacro %}}{{{{ m({C}) | trim }}}}", False),
    "counts its letters": (f"{{{{ {C} }}}}{{% if {C} | length > 20 %}}!{{% endif %}}", True),
    "writes part of it": (f"{{{{ {C} }}}}{{{{ {C}[:3] }}}}", True),
    "changes its case": (f"{{{{ {C} | upper }}}}", True),
    "changes its case by a method": (f"{{{{ {C}.upper() }}}}", True),
    "escapes it": (f"{{{{ {C} | tojson }}}}", True),
    "looks at each letter": (f"{{% for c in {C} %}}{{{{ c }}}}{{% endfor %}}", True),
    "compares two": (f"{{% if {C} == messages[0]['content'] %}}!{{% endif %}}{{{{ {C} }}}}", True),
    "joins and counts": (f"{{% set c = 'a' ~ {C} %}}{{{{ c }}}}{{{{ c | length }}}}", True),
    "joins by a method": (f"{{% set c = ''.join([{C}, '']) %}}{{{{ c }}}}{{{{ c | length }}}}", True),
    "formats it": (f"{{% set c = '%s' % {C} %}}{{{{ c }}}}{{{{ c | length }}}}", True),
    "formats it by a method": (f"{{% set c = '{{}}'.format({C}) %}}{{{{ c }}}}{{{{ c | length }}}}", True),
    "counts what a macro wrote": (
        f"{{% macro m(c) %}}{{{{ c }}}}{{% endmacro %}}{{{{ {C} }}}}{{{{ m({C}) | length }}}}",
        True,
    ),
    "counts a block": (f"{{% set c %}}{{{{ {C} }}}}{{% endset %}}{{{{ c }}}}{{{{ c | length }}}}", True),
    "filters a block": (f"{{% filter upper %}}{{{{ {C} }}}}{{% endfilter %}}", True),
    "writes the message": (f"{{{{ {C} }}}}{{{{ message }}}}", True),
    "joins all": (f"{{{{ {C} }}}}{{{{ messages | map(attribute='content') | join(',') | length }}}}", True),
    "looks it up": (f"{{{{ {C} }}}}{{{{ {{'a': 1}}.get({C}, 0) }}}}", True),
    "looks for it in a text": (f"{{{{ {C} }}}}{{% if {C} in 'abc' %}}!{{% endif %}}", True),
    "looks for a text without it": (f"{{{{ {C} }}}}{{% if {C} not in 'abc' %}}!{{% endif %}}", True),
    "looks for it in a list": (f"{{{{ {C} }}}}{{% if {C} in ['[x]', '[y]'] %}}!{{% endif %}}", False),
    "formats two": (f"{{% set c = '%s%s' % ({C}, '') %}}{{{{ c }}}}{{{{ c | length }}}}", True),
    "counts messages": (
        f"{{{{ {C} }}}}{{% if loop.index % 2 in [0, 3] and 'name' not in message %}}!{{% endif %}}",
        False,
    ),
    "strips a letter": (f"{{{{ {C}.strip('b') }}}}", True),
    "escapes all": (f"{{% autoescape true %}}{{{{ {C} }}}}{{% endautoescape %}}", True),
    "adds it to what is safe": (f"{{{{ ('so: ' | safe) + {C} }}}}", True),
    "adds what is safe": (f"{{{{ {C} + (' .' | safe) }}}}", True),
    "adds it to what Jinja escapes as it compiles": (f"{{{{ ('<' | e) + {C} }}}}", True),
    "looks for it in a text, in a chain": (f"{{{{ {C} }}}}{{% if {C} in 'abc' in ['abc'] %}}!{{% endif %}}", True),
    "joins values": ("{% set c = message.values() | join(' ') %}{{ c }}{{ c | length }}", True),
    "joins values by a method": ("{% set c = ' '.join(message.values()) %}{{ c }}{{ c | length }}", True),
    "joins what it reversed": ("{% set c = message.values() | list | reverse | join %}{{ c }}{{ c | length }}", True),
    "puts it into a text": (f"{{% set c = '[X]' | replace('[X]', {C}) %}}{{{{ c }}}}{{{{ c | length }}}}", True),
    "replaces it in a text": (f"{{{{ {C} }}}}{{{{ 'abc' | replace({C}, '') }}}}", True),
    "strips its letters from a text": (f"{{{{ {C} }}}}{{{{ 'abc' | trim({C}) }}}}", True),
    "asks for its identity": (f"{{{{ {C} }}}}{{% if {C} is sameas 'a' %}}!{{% endif %}}", True),
    "asks how it begins after a newline": (
        f"{{% set c = '\n' + {C} %}}{{{{ c }}}}{{% if c.startswith('\n[x]') %}}!{{% endif %}}",
        False,
    ),
    "looks for a text and a newline": (
        f"{{% set c = {C} + '\n' %}}{{{{ c }}}}{{% if 'c[x]\n' in c %}}!{{% endif %}}",
        False,
    ),
    "compares it between blanks": (
        f"{{% macro m(c) %}} {{{{ c }}}} {{% endmacro %}}{{{{ {C} }}}}{{% if m({C}) == ' [x] b ' %}}!{{% endif %}}",
        False,
    ),
    "asks for a role in a loop with variables of its own": (
        f"{{% set t = namespace() %}}{{% if 'user'.startswith('us') %}}{{{{ {C} }}}}{{% endif %}}",
        False,
    ),
    "asks how it begins after joining": (
        f"{{% set c = '[' + {C} %}}{{{{ c }}}}{{% if c.startswith('[x]') %}}!{{% endif %}}",
        True,
    ),
}
CONTENTS = ("a", "b", "a question of more than twenty letters", "[x] b", "x] b", "b\n\nc[x]", "\nb", "naïve 😀", "<b>")


@pytest.mark.parametrize("what", DOES)
def test_the_text_is_the_templates_whatever_it_does_with_a_content(what, monkeypatch):
    does, depends = DOES[what]
    one = renderer("{% for message in messages %}" + SAYS + does + END)
    own = make_tokenizer(one._encode_chat._tokenizer.chat.chat_template)
    runs = runs_of_the_template(one, monkeypatch)
    for question in CONTENTS:
        for answer in CONTENTS:
            record = talk(question, answer)
            try:
                document = one(check(record))
            except ConversationError:
                # In what is written twice, or in another way, answers cannot be found.
                continue
            assert document.ids.tolist() == own.apply_chat_template(record["messages"])["input_ids"], record
    if depends:
        assert len(runs) >= len(CONTENTS) ** 2
    else:
        assert len(runs) < len(CONTENTS) ** 2 / 2 + 8


@pytest.mark.parametrize("blank", ["", " ", "  ", "\n"])
@pytest.mark.parametrize("trims", [True, False])
def test_blanks_at_the_ends_of_a_span_are_in_the_loss_as_the_tokenizers_offsets_say(trims, blank):
    from tokenizers import processors

    core = type(make_core()).from_str(make_core().to_str())
    core.post_processor = processors.ByteLevel(trim_offsets=trims)
    says = f"{{% generation %}}{{{{ {blank!r} + {C} + {blank!r} }}}}{{% endgeneration %}}"
    either = f"{{% if loop.last %}}{says}{{% else %}}{{{{ {C} }}}}{{% endif %}}"
    source = "{% for message in messages %}{{ message['role'] + ':' }}" + either + "{% endfor %}"
    own = make_tokenizer(source, tokenizer_object=core)
    one = Renderer(load_tokenizer(own), "hf")
    for answer in ("b", "b c", "naïve", "c"):
        record = talk("a", answer)
        document = one(check(record))
        text = own.apply_chat_template(record["messages"], tokenize=False)
        whole = own(text, return_offsets_mapping=True)
        assert document.ids.tolist() == whole["input_ids"]
        begin = text.index("assistant:") + len("assistant:")
        in_loss = [end > begin and first < len(text) for first, end in whole["offset_mapping"]]
        assert document.mask.tolist() == in_loss


@pytest.mark.parametrize("name", names())
def test_a_shape_gives_what_the_stock_template_gives(name):
    coder = load_tokenizer(make_stock(name))
    fast, slow = Renderer(coder, "hf"), Renderer(coder, "hf")
    slow._encode_chat._shapes = None
    for record in [talk("What?", "That."), talk("Two\n\nlines", "é <b>x</b>", " and", "so\n"), *shipped(8)]:
        try:
            expected = slow(check(record))
        except ConversationError as error:
            with pytest.raises(ConversationError) as caught:
                fast(check(record))
            assert str(caught.value) == str(error)
            continue
        # The first of a shape is made in both ways.
        for _ in range(2):
            found = fast(check(record))
            assert found.ids.tolist() == expected.ids.tolist()
            assert found.mask.tolist() == expected.mask.tolist()


@given(st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join), min_size=2, max_size=2))
def test_ids_and_mask_are_those_of_offsets_on_any_contents(contents):
    for one in (OF_PLAIN, OF_MARKED, OF_PART):
        chat = one._encode_chat
        try:
            expected: Document = chat._encoded_whole(*chat._written(check(talk(*contents))))
        except ConversationError:
            continue
        found = one(check(talk(*contents)))
        assert found.ids.tolist() == expected.ids.tolist()
        assert found.mask.tolist() == expected.mask.tolist()


# What is in the loss begins and ends within the text between two added tokens.
PART = "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}: {% else %}{% generation %}"
PART += "{{ m['content'] }}<|im_end|>\n{% endgeneration %}Next {% endif %}{% endfor %}"
OF_PLAIN, OF_MARKED, OF_PART = renderer(PLAIN), renderer(MARKED), renderer(PART)


def test_a_token_that_a_content_and_its_neighbour_make_together_is_found():
    between = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n<{{ m['content'] }}<|im_end|>\n{% endfor %}" + PROMPT
    one = renderer(between)
    own = make_tokenizer(between)
    for answer in ("b", "think>b"):
        record = talk("a", answer)
        assert one(check(record)).ids.tolist() == own.apply_chat_template(record["messages"])["input_ids"]
    assert own.convert_tokens_to_ids("<think>") in one(check(talk("a", "think>b"))).ids


def test_white_space_that_a_token_takes_is_not_in_the_texts_around_it():
    from tokenizers import AddedToken

    greedy = make_tokenizer(PLAIN)
    greedy.add_tokens([AddedToken("<|sep|>", lstrip=True, rstrip=True, special=True)])
    greedy.chat_template = PLAIN.replace("<|im_end|>", " <|sep|> ")
    one = Renderer(load_tokenizer(greedy), "hf")
    for contents in (("a", "b"), ("a \n", " b "), ("c", "d")):
        record = talk(*contents)
        assert one(check(record)).ids.tolist() == greedy.apply_chat_template(record["messages"])["input_ids"]


@pytest.mark.parametrize("trims", [True, False])
@pytest.mark.parametrize("answer", ["b", " b", "", "<t>"])
def test_white_space_that_a_token_takes_puts_it_into_the_loss_as_the_tokenizers_offsets_say(trims, answer):
    from tokenizers import AddedToken, processors

    core = type(make_core()).from_str(make_core().to_str())
    core.post_processor = processors.ByteLevel(trim_offsets=trims)
    core.add_special_tokens([AddedToken("[/INST]", lstrip=True, rstrip=True, special=True)])
    # as in Mistral's, the answer begins with the blank that the token before takes
    asks = "<|im_start|>{{ m['content'] }} [/INST]"
    source = "{% for m in messages %}{% if m['role'] == 'user' %}" + asks + "{% else %} {{ m['content'] }}<|im_end|>"
    own = make_tokenizer(source + "{% endif %}{% endfor %}", tokenizer_object=core)
    record = talk("a", answer)
    found = Renderer(load_tokenizer(own), "hf")(check(record))
    begin = found.ids.tolist().index(own.convert_tokens_to_ids("[/INST]"))
    assert found.mask.tolist() == [False] * begin + [not trims] + [True] * (len(found.mask) - begin - 1)
    assert verify([record], own, batch_size=1, seq_len=32, template="hf", packing="best_fit_pad").batches == 1


def test_a_text_that_becomes_abnormal_where_pieces_meet_is_left_to_the_tokenizer():
    from tokenizers import Tokenizer, normalizers

    prompt = PROMPT.replace("assistant\n", "e")
    tokenizer = make_tokenizer("{% for m in messages %}<|im_start|>e{{ m['content'] }}<|im_end|>{% endfor %}" + prompt)
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.normalizer = normalizers.NFC()
    tokenizer = make_tokenizer(tokenizer.chat_template, tokenizer_object=core)
    one = Renderer(load_tokenizer(tokenizer), "hf")
    for question in ("x", "\u0301x", "y"):
        record = talk(question, "b")
        ids = tokenizer.apply_chat_template(record["messages"])["input_ids"]
        assert one(check(record)).ids.tolist() == ids


@pytest.mark.parametrize("has_shapes", [True, False])
def test_every_so_often_a_document_is_compared_and_a_difference_stops_the_run(has_shapes, monkeypatch):
    monkeypatch.setattr(hf_template, "SPOT_CHECK", 3)
    one = renderer(PLAIN)
    if not has_shapes:
        one._encode_chat._shapes = None
    chats = [check(talk(f"a{number}", "b")) for number in range(7)]
    assert [one.plan(chat).expected is not None for chat in chats] == [True, False, False] * 2 + [True]
    same = one(chats[0])
    for wrong in (one(chats[1]), replace(same, mask=~same.mask), replace(same, ids=same.ids[:-1], mask=same.mask[:-1])):
        plan = one.plan(chats[0])._replace(expected=wrong)
        with pytest.raises(EncoderError, match=r"differs from the chat template's own at token \d+: expected \["):
            one.fill_in([plan])


def test_a_difference_while_a_loader_runs_is_never_skipped_and_names_the_conversation(monkeypatch):
    fill = hf_shapes._fill
    monkeypatch.setattr(hf_shapes, "_fill", lambda shape, contents: fill(shape, [text.upper() for text in contents]))
    arguments = {"template": "hf", "on_error": "skip", "num_workers": 0}
    with (
        Loader([talk("a", "b")], make_tokenizer(PLAIN), 1, 64, **arguments) as loader,
        pytest.raises(
            EncoderError, match=r"conversation 0.*differs from the chat template's own at token 4.*report it; "
        ),
    ):
        next(loader)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("chat_template", [PLAIN, MARKED, PLAIN.replace("['content']", "['content'] | trim")])
def test_batches_are_the_reference_packers(chat_template, workers):
    chats = [*shipped(60), talk("a", " b"), talk("<think>", "c"), talk("a", "e\u0301\n")]
    arguments = {"batch_size": 2, "seq_len": 128, "on_error": "skip", "template": "hf", "num_workers": workers}
    found = verify(chats, make_tokenizer(chat_template), **arguments)
    assert found, found.difference
