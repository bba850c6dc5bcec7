"""The chat templates that trl ships, on the tokenizer of tiny_hf.py with their special tokens, and conversations."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

from tiny_hf import make_core

# What the templates write around messages, and what a model says between.
SPECIAL = re.compile(
    r"<\|[^<>|\s'\"]{1,30}\|?>|<[^<>|\s'\"]{1,30}\|>|<｜[^<>\s]{1,30}｜>|<(?:start|end)_of_turn>|<eos>|<bos>|\[gMASK\]|<sop>"
    r"|<end_of_utterance>|<image>"
)
SPOKEN = re.compile(r"</?(?:think|tool_call|tool_response|tools|arg_key|arg_value)>")

U = {"role": "user", "content": "What is 2 * 3?"}
A = {"role": "assistant", "content": "It is six."}
U2 = {"role": "user", "content": "And  4 * 5?"}
A2 = {"role": "assistant", "content": "Twenty, naïve 😀."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call00001",
            "type": "function",
            "function": {"name": "multiply", "arguments": {"a": 7, "unit": 'a "metre" é'}},
        }
    ],
}
RESULT = {"role": "tool", "name": "multiply", "tool_call_id": "call00001", "content": "forty-two"}
TOOL = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "Multiplies two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number", "description": "the first"}, "unit": {"type": "string"}},
            "required": ["a"],
        },
    },
}
TALKS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [U, A]},
    "two turns": {"messages": [U, A, U2, A2]},
    "three turns": {"messages": [U, A, U2, A2, U, {**A, "content": "Six again."}]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, U, A]},
    "tools": {"messages": [U, A], "tools": [TOOL]},
    "tool result": {"messages": [U, CALL, RESULT, A2]},
    "tool result and tools": {"messages": [U, CALL, RESULT, A2], "tools": [TOOL]},
    "ends with a call": {"messages": [U, CALL]},
    "reasoning": {"messages": [U, {**A, "reasoning_content": "Two threes."}]},
    "earlier reasoning": {"messages": [U, {**A, "reasoning_content": "Two threes."}, U2, A2]},
    "empty content": {"messages": [U, {**A, "content": ""}, U2, A2]},
}


@functools.cache
def folder() -> Path | None:
    """The folder of trl's chat templates; None where trl is not installed, or has none, as 1.0."""
    found = importlib.util.find_spec("trl")
    path = Path((found.submodule_search_locations or [""])[0], "chat_templates") if found else None
    return path if path and path.is_dir() else None


def names(*, training: bool | None = None) -> list[str]:
    found = sorted(path.stem for path in folder().glob("*.jinja")) if folder() else []
    return [name for name in found if training is None or name.endswith("_training") == training]


@functools.cache
def source(name: str) -> str:
    return (folder() / f"{name}.jinja").read_text(encoding="utf-8")


@functools.cache
def make_stock(name: str, chat_template: str | None = None) -> Any:
    """Return the tokenizer for a template of trl: what it writes around messages is special there."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    text = source(name) + (source(f"{name}_training") if f"{name}_training" in names() else "")
    core = type(make_core()).from_str(make_core().to_str())
    core.add_special_tokens(sorted({"<s>", "</s>", *SPECIAL.findall(text)}))
    core.add_tokens([AddedToken(token, special=False) for token in sorted(set(SPOKEN.findall(text)))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = chat_template or source(name)
    return tokenizer
