"""Nulls that Arrow put into calls of tools are refused, and those that a model may write are not."""

from __future__ import annotations

import pytest

from nanopack import ConversationError, Loader, verify
from nanopack.conversations.records import check
from nanopack.render.renderer import Renderer
from nanopack.tokenizers.tokenizer import load_tokenizer

pytest.importorskip("transformers", reason="needs transformers: pip install 'nanopack-gpu[hf]'")

from hf_chats import FULL, A, U, shown
from tiny_hf import make_tokenizer

TOKENIZER = make_tokenizer(FULL)
OPTIONS = {"batch_size": 1, "seq_len": 256, "template": "hf", "packing": "best_fit_pad"}


def called(**calls):
    """A message with calls of tools, by name."""
    made = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in calls.items()]
    return {"role": "assistant", "content": "", "tool_calls": made}


def tool(name, *keys, says=None, **more):
    properties = {key: {"type": "string", **(says or {})} for key in keys}
    parameters = {"type": "object", "properties": properties, **more}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


def render(record):
    return shown(Renderer(load_tokenizer(TOKENIZER), "hf")(check(record)))


RECORDS = {
    "arguments that a tool does not have": (
        [
            {"messages": [U, called(f={"a": "x"}), A], "tools": [tool("f", "a", "b")]},
            {"messages": [U, called(f={"c": "y"}), A], "tools": [tool("f", "a", "b")]},
        ],
        "message 1: tool_calls: f has the argument 'c', which is null and no parameter of that tool: Arrow gives every",
    ),
    "parameters": (
        [
            {"messages": [U, called(f={"a": "x"}), A], "tools": [tool("f", "a")]},
            {"messages": [U, called(g={"b": "y"}), A], "tools": [tool("g", "b")]},
        ],
        "tools: f has the parameter 'b', which is null: Arrow gives every struct",
    ),
    "a keyword of a parameter": (
        [
            {"messages": [U, called(f={"a": "x"}), A], "tools": [tool("f", "a")]},
            {"messages": [U, called(g={"a": "y"}), A], "tools": [tool("g", "a", says={"enum": ["y"]})]},
        ],
        "tools: f has 'enum' in its parameters, which is null: Arrow gives every struct",
    ),
    "a keyword of all parameters": (
        [
            {"messages": [U, called(f={"a": "x"}), A], "tools": [tool("f", "a")]},
            {"messages": [U, called(g={"a": "y"}), A], "tools": [tool("g", "a", required=["a"])]},
        ],
        "tools: f has 'required' in its parameters, which is null: Arrow gives every struct",
    ),
    "a parameter in a parameter": (
        [
            {"messages": [U, A], "tools": [tool("f", "a", says={"properties": {"b": {"type": "string"}}})]},
            {"messages": [U, A], "tools": [tool("f", "a", says={"properties": {"c": {"type": "string"}}})]},
        ],
        "tools: f has 'c' in its parameters, which is null: Arrow gives every struct",
    ),
    "arguments of two tools": (
        [{"messages": [U, called(f={"a": "x"}, g={"b": "y"}), A]}],
        "message 1: tool_calls: f has the argument 'b', which is null, as g has others of the same: Arrow gives",
    ),
}


@pytest.mark.parametrize("case", RECORDS)
@pytest.mark.parametrize("listed", [list, lambda dataset: dataset.to_list()])
def test_nulls_that_a_list_of_a_dataset_keeps_are_refused_and_the_dataset_itself_is_read(case, listed):
    datasets = pytest.importorskip("datasets", reason="needs datasets, of the extra test")
    records, why = RECORDS[case]
    dataset = datasets.Dataset.from_list(records)
    assert verify(dataset, TOKENIZER, **OPTIONS).batches > 0
    with (
        Loader(dataset, TOKENIZER, epochs=1, **OPTIONS) as loader,
        Loader(records, TOKENIZER, epochs=1, **OPTIONS) as own,
    ):
        assert [batch.inputs.tolist() for batch in loader] == [batch.inputs.tolist() for batch in own]
    kept = listed(dataset)
    with pytest.raises(ConversationError, match=why):
        render(kept[0])
    assert verify(kept, TOKENIZER, on_error="skip", **OPTIONS).difference is None


NULLS = {
    "of a parameter": {"messages": [U, called(f={"a": "x", "b": None})], "tools": [tool("f", "a", "b")]},
    "without tools": {"messages": [U, called(f={"a": None})]},
    "of tools that share an argument": {"messages": [U, called(f={"a": "x", "b": None}, g={"a": "y", "b": "z"})]},
    "of a tool that uses nothing": {"messages": [U, called(f={"a": None}, g={"a": "y"})]},
    "as a default": {"messages": [U, A], "tools": [tool("f", "a", says={"default": None, "enum": ["x", None]})]},
    "in the JSON of arguments": {"messages": [U, called(f='{"c": null}')], "tools": [tool("f", "a")]},
}


@pytest.mark.parametrize("case", NULLS)
def test_a_null_that_may_be_meant_is_written(case):
    assert "null" in render(NULLS[case]) or "None" in render(NULLS[case])
    assert verify([NULLS[case]], TOKENIZER, **OPTIONS).batches == 1
