"""Chat templates with quirks of real ones, and chats for them."""

from __future__ import annotations

import itertools

import numpy as np
from tiny_hf import PLAIN, PROMPT, make_core, make_tokenizer

from nanopack.conversations.records import check
from nanopack.render.document import Document
from nanopack.render.renderer import Renderer
from nanopack.tokenizers.tokenizer import load_tokenizer

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
