"""Render messages by the chat template that a Hugging Face tokenizer carries: template="hf".

    messages   ->   make_chat_renderer(tokenizer)   ->   ids and mask
                                                         render.py makes a document of them

The tokenizer does all of it, so the ids are those of `apply_chat_template`, and no bos is added to what the template
writes. What is trained is what the template marks with {% generation %}. Where it marks nothing, each assistant's
message is what its rendering adds to the rendering of the messages before it with the generation prompt; white space
behind the special token that ends it is not trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from nanopack.conversations.records import Message
from nanopack.errors import ConversationError
from nanopack.tokenizers.huggingface import HuggingFaceTokenizer

# As transformers looks for it.
GENERATION = re.compile(r"\{\%-?\s*generation\s*-?\%\}")
REMEDY = "give the tokenizer a chat_template with {% generation %} around what is trained, or use a nanopack.Template"

ChatRenderer = Callable[[Sequence[Message]], tuple[np.ndarray, np.ndarray]]


def make_chat_renderer(tokenizer: object) -> ChatRenderer:
    """Return the function that gives ids, (n,) uint32, and mask, (n,) bool, of messages.

    ValueError where the tokenizer has no chat template. The function itself raises ConversationError for messages
    that the template does not take or writes nothing for, or that hold a special token's name, which would become that
    token.
    """
    chat = tokenizer.chat if isinstance(tokenizer, HuggingFaceTokenizer) else None
    if chat is None or not getattr(chat, "chat_template", None):
        raise ValueError(
            f"template='hf' is the chat template of a transformers tokenizer, and tokenizer {_name(tokenizer)!r} has "
            "none; set its chat_template, or use another template."
        )
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    specials = sorted(tokenizer.special_tokens, key=len, reverse=True)
    looks_special = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
    encode = _encode_marked if GENERATION.search(chat.get_chat_template()) else _encode_by_prefixes

    def render(messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        for index, message in enumerate(messages):
            _refuse(index, message, looks_special)
        plain = [{"role": m.role, "content": m.content, **(m.rest or {})} for m in messages]
        ids, mask = encode(chat, plain, specials)
        if not len(ids):
            raise ConversationError("the tokenizer's chat template writes nothing for it")
        return np.array(ids, np.uint32), np.array(mask, bool)

    return render


def _name(tokenizer: object) -> str:
    return str(getattr(tokenizer, "name", type(tokenizer).__name__))


def _refuse(index: int, message: Message, looks_special: re.Pattern[str]) -> None:
    """Raise ConversationError for what the template would turn into something else than it says."""
    if not isinstance(message.content, str):
        raise ConversationError(f"message {index}: content is a list of parts; with template='hf' it must be a string")
    for text in _strings([message.content, message.rest]):
        if found := looks_special.search(text):
            raise ConversationError(
                f"message {index}: it holds the text {found[0]!r}, which template='hf' would make a special token; "
                "other templates keep it text"
            )


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _apply(chat: Any, messages: list[dict[str, Any]], **how: Any) -> Any:
    try:
        return chat.apply_chat_template(messages, **how)
    except MemoryError:
        raise
    # A template is a program of its own: what it raises can be anything.
    except Exception as error:
        what = next(iter(str(error).splitlines()), "")
        raise ConversationError(f"the tokenizer's chat template refuses it: {type(error).__name__}: {what}") from error


def _encode_marked(chat: Any, messages: list[dict[str, Any]], _: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return ids and mask as the template's own marks say."""
    found = _apply(chat, messages, return_dict=True, return_assistant_tokens_mask=True)
    return found["input_ids"], found["assistant_masks"]


def _encode_by_prefixes(
    chat: Any, messages: list[dict[str, Any]], specials: Sequence[str]
) -> tuple[list[int], list[bool]]:
    """Return ids and mask, where what the assistant says is found by rendering without it."""
    whole: str = _apply(chat, messages, tokenize=False)
    spans = [
        _span(chat, messages, index, whole, specials)
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    found = chat(whole, add_special_tokens=False, return_offsets_mapping=True)
    mask = [
        any(token_end > begin and token_begin < end for begin, end in spans)
        for token_begin, token_end in found["offset_mapping"]
    ]
    return found["input_ids"], mask


def _span(
    chat: Any, messages: list[dict[str, Any]], index: int, whole: str, specials: Sequence[str]
) -> tuple[int, int]:
    """Return where the message stands in the whole text."""
    if index == 0:
        raise ConversationError(f"message 0: role is 'assistant', and nothing comes before it to tell apart; {REMEDY}")
    before: str = _apply(chat, messages[:index], tokenize=False, add_generation_prompt=True)
    after: str = _apply(chat, messages[: index + 1], tokenize=False)
    if not (whole.startswith(after) and after.startswith(before)):
        raise ConversationError(
            f"message {index}: the chat template writes it in another way when others follow or it is asked for, so "
            f"what is trained cannot be told; {REMEDY}"
        )
    said = after.rstrip()
    return len(before), len(said) if said.endswith(tuple(specials)) and len(said) > len(before) else len(after)
