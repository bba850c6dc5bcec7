"""What the reference reads, renders and refuses, by examples worked out by hand."""

from __future__ import annotations

import gzip

import pytest
from data_sets import byte_tokenizer
from toy_batches import (
    ASSISTANT,
    ASSISTANT_END,
    BOS,
    END,
    EOT,
    HEADER,
    HEADER_END,
    NL,
    NO,
    ONE,
    OUTPUT,
    OUTPUT_END,
    PYTHON,
    PYTHON_END,
    START,
    TALK,
    TOY,
    USER,
    USER_END,
    a,
    assistant,
    b,
    c,
    d,
    facts,
    o,
    only,
    p,
    q,
    read,
    s,
    t,
    take,
    targets,
    texts,
    u,
    user,
)

from nanopack.errors import ConversationError
from nanopack.packing import BestFit
from nanopack.reference.batches import batches

# rendering


def test_conversation_with_parts():
    said = [("text", "t"), ("python", "p"), ("python_output", "o")]
    parts = [{"type": kind, "text": text} for kind, text in said]
    batch = only([[user("q"), assistant(parts)]], packing="pad", batch_size=1, seq_len=12)
    assert batch.inputs.tolist() == [
        [BOS, USER, q, USER_END, ASSISTANT, t, PYTHON, p, PYTHON_END, OUTPUT, o, OUTPUT_END],
    ]
    assert batch.targets.tolist() == [[NO, NO, NO, NO, t, PYTHON, p, PYTHON_END, NO, NO, NO, ASSISTANT_END]]
    assert batch.num_loss_tokens == 5


SYSTEM = {"messages": [{"role": "system", "content": "s"}, *TALK["messages"]]}


def test_system_message_is_put_before_the_first_question():
    batch = only([SYSTEM], packing="pad", batch_size=1, seq_len=9)
    assert batch.inputs.tolist() == [[BOS, USER, s, NL, NL, u, USER_END, ASSISTANT, a]]
    assert batch.targets.tolist() == [[NO, NO, NO, NO, NO, NO, NO, a, ASSISTANT_END]]


def test_chatml():
    batch = only([SYSTEM], packing="pad", batch_size=1, seq_len=34, template="chatml")
    system = [START, *b"system", NL, s, END, NL]
    question = [START, *b"user", NL, u, END, NL]
    answer = [START, *b"assistant", NL, a, END]
    assert batch.inputs.tolist() == [[BOS, *system, *question, *answer]]
    # Of the 35 tokens the last is a new line that is not in the loss.
    assert batch.targets.tolist() == [[NO] * 31 + [a, END, NO]]


def test_llama3():
    spaced = [{"role": "system", "content": " s\n"}, user("\n\nu"), assistant(" a ")]
    batch = only([spaced], packing="pad", batch_size=1, seq_len=38, template="llama3")
    system = [HEADER, *b"system", HEADER_END, NL, NL, s, EOT]
    question = [HEADER, *b"user", HEADER_END, NL, NL, u, EOT]
    answer = [HEADER, *b"assistant", HEADER_END, NL, NL, a, EOT]
    assert batch.inputs.tolist() == [[BOS, *system, *question, *answer]]
    assert batch.targets.tolist() == [[NO] * 35 + [a, EOT, NO]]


@pytest.mark.parametrize(
    ("template", "before", "end"),
    [
        ("chatml", [START, *b"tool", NL], [END, NL]),
        ("llama3", [HEADER, *b"ipython", HEADER_END, NL, NL], [EOT]),
    ],
)
@pytest.mark.parametrize("role", ["tool", "ipython"])
def test_what_a_tool_gave_back_is_not_in_the_loss(template, before, end, role):
    talk = {"messages": [{"role": role, "content": "o"}]}
    seq_len = len(before) + 2 + len(end)
    batch = only([talk], packing="best_fit_pad", batch_size=1, seq_len=seq_len, template=template)
    assert batch.inputs.tolist() == [[BOS, *before, o, *end]]
    assert batch.num_loss_tokens == 0


def test_a_function_call_of_sharegpt_is_the_assistants_and_an_observation_the_tools():
    said = [("function_call", "a"), ("observation", "o")]
    talk = {"conversations": [{"from": role, "value": text} for role, text in said]}
    call, result = [START, *b"assistant", NL, a, END, NL], [START, *b"tool", NL, o, END]
    batch = only([talk], packing="pad", batch_size=1, seq_len=23, template="chatml")
    assert batch.inputs.tolist() == [[BOS, *call, *result]]
    assert batch.targets.tolist() == [[NO] * 11 + [a, END] + [NO] * 10]


def test_nanochat_has_no_tool():
    with pytest.raises(ConversationError, match=r"message 1: role is 'tool'"):
        take(1, [[user("q"), {"role": "tool", "content": "o"}]], batch_size=1, seq_len=9)


def test_text_that_looks_like_a_special_token_stays_text():
    batch = only(texts("<|bos|>"), packing="pad", batch_size=1, seq_len=7)
    assert batch.targets.tolist() == [[60, 124, 98, 111, 115, 124, 62]]


@pytest.mark.parametrize(
    "record",
    [
        TALK["messages"],
        {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
        {"messages": TALK["messages"], "conversations": None, "text": None, "weight": None, "source": "x"},
    ],
    ids=["bare list", "ShareGPT", "what is null is absent"],
)
def test_other_shapes_give_the_same_batch(record):
    batch = only([record], packing="pad", batch_size=1, seq_len=6)
    assert batch.inputs.tolist() == [[BOS, USER, u, USER_END, ASSISTANT, a]]
    assert batch.targets.tolist() == [[NO, NO, NO, NO, a, ASSISTANT_END]]


# files and bad input


def test_files_are_read_in_order_without_blank_lines(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n\n  \n{"text": "c"}')
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n')
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "d"}\n'))
    files = [tmp_path / "d.jsonl.gz", str(tmp_path / "*.jsonl")]
    assert targets(take(None, files, epochs=1, **ONE)) == [[[d]], [[a]], [[b]], [[c]]]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "two.parquet"
    rows = [{**TALK, "text": None, "weight": None}, {"messages": None, "text": "a", "weight": 0.5}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = take(None, str(path), packing="pad", batch_size=2, seq_len=6, loss_weights="token", epochs=1)
    assert targets(found) == [[[NO, NO, NO, NO, a, ASSISTANT_END], [a, NO, NO, NO, NO, NO]]]
    assert found[0].weights.tolist() == [[0, 0, 0, 0, 1, 1], [0.5, 0, 0, 0, 0, 0]]


BAD = {
    "not a dict": 3,
    "a string": "hello",
    "no shape": {"prompt": "x"},
    "two shapes": {"text": "x", "messages": [user("x")]},
    "text is no string": {"text": 3},
    "messages is no list": {"messages": "x"},
    "no messages": {"messages": []},
    "message is no dict": ["x"],
    "message without content": [{"role": "user"}],
    "content is null": [user(None)],
    "first is the assistant": [assistant("x")],
    "user twice": [user("x"), user("y")],
    "unknown role": [user("x"), {"role": "tool", "content": "y"}],
    "role is no string": [{"role": 1, "content": "y"}],
    "a judge": [{"role": "judge", "content": "x"}],
    "system alone": [{"role": "system", "content": "x"}],
    "system before the assistant": [{"role": "system", "content": "x"}, assistant("y")],
    "system in the middle": [user("x"), {"role": "system", "content": "y"}],
    "system with code": [{"role": "system", "content": [{"type": "python", "text": "x"}]}, user("x")],
    "user with code": [user([{"type": "text", "text": "x"}, {"type": "python", "text": "x"}])],
    "unknown part": [user("x"), assistant([{"type": "image", "text": "x"}])],
    "part without text": [user("x"), assistant([{"type": "text"}])],
    "part is a string": [user("x"), assistant(["x"])],
    "role and from": {"conversations": [user("x") | {"from": "human"}]},
    "ShareGPT from nobody": {"conversations": [{"from": "tool", "value": "x"}]},
    "weight below 0": {"text": "x", "weight": -1},
    "weight is not a number": {"text": "x", "weight": float("nan")},
    "weight is infinite": {"text": "x", "weight": float("inf")},
    "weight beyond float32": {"text": "x", "weight": 1e39},
    "weight is a bool": {"text": "x", "weight": True},
    "weight is a string": {"text": "x", "weight": "1"},
}


@pytest.mark.parametrize("record", BAD.values(), ids=BAD.keys())
def test_bad_conversation_is_named_or_skipped(record):
    three = [{"text": "a"}, record, {"text": "b"}]
    with pytest.raises(ConversationError, match=r"^conversation 1, .*\. Fix it or pass on_error=\"skip\"\.$"):
        take(None, three, epochs=1, **ONE)
    found = take(None, three, epochs=1, on_error="skip", **ONE)
    assert read(found) == [[0], [2]]
    rows = take(None, three, packing=BestFit(window=1), batch_size=1, seq_len=1, epochs=1, on_error="skip")
    # Skipped is consumed.
    assert facts(rows, "progress", "last") == [(1 / 3, False), (1.0, True)]


def test_parts_and_unknown_roles_are_bad_in_chatml():
    for messages in ([assistant([{"type": "python", "text": "x"}])], [{"role": "judge", "content": "x"}]):
        with pytest.raises(ConversationError, match="message 0"):
            take(1, [messages], template="chatml", batch_size=1, seq_len=9)


BROKEN = {
    "JSON": b'{"text": "a"',
    "UTF-8": b'{"text": "\xff"}',
    "UTF-16": '{"text": "a"}'.encode("utf-16-le"),
}


@pytest.mark.parametrize("line", BROKEN.values(), ids=BROKEN.keys())
def test_broken_line_is_named_or_skipped(tmp_path, line):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(ConversationError) as error:
        take(None, path, epochs=1, **ONE)
    assert str(error.value).startswith(f"{path}:3, ")
    assert targets(take(None, path, epochs=1, on_error="skip", **ONE)) == [[[a]], [[b]]]


class Exhausted:
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> object:
        raise MemoryError


def test_lack_of_memory_is_not_a_bad_conversation():
    with pytest.raises(MemoryError):
        take(1, Exhausted(), on_error="skip", batch_size=1, seq_len=1)


@pytest.mark.parametrize("name", ["packing", "loss", "loss_weights", "template", "on_error"])
def test_unknown_choice_is_refused_before_the_first_batch(name):
    with pytest.raises(ValueError, match=f"{name}='none'"):
        batches(texts("a"), TOY, **{name: "none"})
    with pytest.raises(ValueError, match="extras='length'"):
        batches(texts("a"), TOY, extras=["positions", "length"])


COUNTS = [
    "batch_size",
    "seq_len",
    "world_size",
    "max_pieces",
    "max_document_tokens",
    "epochs",
]


@pytest.mark.parametrize("name", COUNTS)
def test_impossible_number_is_refused_before_the_first_batch(name):
    for value in (0, -1, 1.0, True, "1"):
        with pytest.raises(ValueError, match=f"^{name}={value!r} is impossible"):
            batches(texts("a"), TOY, **{name: value})


def test_rank_outside_the_world_and_room_for_too_many_pieces_are_refused():
    for rank in (-1, 2, 0.0, None):
        with pytest.raises(ValueError, match=f"^rank={rank} of world_size=2 is impossible"):
            batches(texts("a"), TOY, rank=rank, world_size=2)
    with pytest.raises(ValueError, match=r"^max_pieces=9 is more than seq_len=8"):
        batches(texts("a"), TOY, seq_len=8, max_pieces=9)


def test_tokenizer_without_a_special_token_is_not_taken_for_bad_conversations():
    bare = byte_tokenizer(specials=["<|bos|>"])
    mixed = [{"text": "a"}, TALK, {"text": "b"}]
    found = batches(mixed, bare, on_error="skip", **ONE)
    assert next(found).targets.tolist() == [[a]]
    with pytest.raises(ValueError, match=r"^conversation 1: template='nanochat' needs .*user_start"):
        next(found)
