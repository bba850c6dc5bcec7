"""Promises of nanopack/templates.py, and of batches by each template: they are the reference packer's."""

from __future__ import annotations

import json
from importlib import resources

import pytest

from nanopack import verify
from nanopack.tokenizers import Tokenizer, from_ranks, load_tokenizer

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
    lines = (DATA / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
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
    arguments = {"batch_size": 4, "seq_len": 256, "weights": "token", "workers": workers}
    tokenizer = tokenizer_with(SPECIAL_TOKENS[template])
    found = verify([*EDGES, *shipped(60)], tokenizer, template=template, **arguments)
    assert found, found.difference
    assert found.tokens > 5000
