"""The slow packer's documents: conversations rendered token by token.

    records.py   ->   render()   ->   tokens (id, in the loss)   ->   packing.py packs them

A part of the definition. It shares nothing with the fast path but the tokenizing of one string and the name
of an error.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

from nanopack.errors import ConversationError
from nanopack.reference.chat import Chat
from nanopack.reference.messages import WRITTEN_BY_HF, Said
from nanopack.reference.records import Record
from nanopack.reference.tokens import Tokens
from nanopack.render.templates import Template
from nanopack.tokenizers.huggingface import HuggingFaceTokenizer
from nanopack.tokenizers.tokenizer import AnyTokenizer


def check_ids(tokens: Tokens, vocab_size: int) -> Tokens:
    """Return the tokens; ConversationError where a tokenizer of that size has not all of them."""
    for id, _ in tokens:
        if not 0 <= id < vocab_size:
            raise ConversationError(f"input_ids has {id}; the tokenizer has ids from 0 to {vocab_size - 1}")
    return tokens


# Rendering: a conversation becomes tokens, (id, in the loss). A template yields what is encoded in one
# go: ("special", the special token, in the loss) or ("text", the text, in the loss).

Span = tuple[str, str, bool]
Messages = list[Said]


def render(record: Record, coder: AnyTokenizer, template: str | Template) -> Tokens:
    """Return the tokens (id, in the loss) of a text or of messages."""
    messages, text = record.messages, record.text
    if text is not None:
        spans: Iterator[Span] = iter([("text", text, True)])
    elif template in ("hf", "hf-training"):
        if not (tokens := _hf(record, coder)):
            raise ConversationError("its chat template writes nothing")
        return tokens
    elif record.tools or record.template_kwargs or any({*said.rest} & WRITTEN_BY_HF for said in messages):
        raise ConversationError("it has what no template but 'hf' can write, such as tools or tool_calls")
    elif isinstance(template, Template):
        spans = _own(messages, template)
    else:
        spans = {"nanochat": _nanochat, "chatml": _chatml, "llama3": _llama3}[template](messages)
    # Plain text is in the loss throughout, the first token included.
    tokens = [(coder.bos_id, text is not None)]
    for kind, string, in_loss in spans:
        # Only a template makes special tokens: what looks like one in a message stays text.
        ids = [coder.special_id(string)] if kind == "special" else _encode(string, coder)
        tokens += [(int(id), in_loss) for id in ids]
    return tokens


def _encode(text: str, coder: AnyTokenizer) -> Iterable[int]:
    if isinstance(coder, HuggingFaceTokenizer):
        return coder.encode_exactly([text])[0]
    try:
        # as tiktoken itself does it, by the encoding's own pattern
        return coder.encoding.encode_ordinary(text)
    except BaseException as error:
        if isinstance(error, (Exception, KeyboardInterrupt)):
            raise
        # a panic: tiktoken refuses it, and the tokenizer says so in its own words
        return coder.encode(text)


def _nanochat(messages: Messages) -> Iterator[Span]:
    merged = 0
    if len(messages) > 1 and messages[0].role in ("system", "developer") and messages[1].role == "user":
        # A system message has no tokens of its own: it is put before the first question.
        both = messages[0].string(0) + "\n\n" + messages[1].string(1)
        messages, merged = [Said("user", both, {}), *messages[2:]], 1
    for index, said in enumerate(messages, start=merged):
        role = said.role
        expected = "user" if index % 2 == merged else "assistant"
        if role != expected:
            raise ConversationError(f"message {index}: role is {role!r}; it must be {expected!r} here")
        yield "special", f"<|{role}_start|>", False
        if role == "user":
            yield "text", said.string(index), False
        elif isinstance(said.content, str):
            yield "text", said.content, said.train
        else:
            for kind, text in said.content:
                yield from _nanochat_part(kind, text, said.train)
        # The assistant's end is in the loss: the model must learn to stop.
        yield "special", f"<|{role}_end|>", role == "assistant" and said.train


def _nanochat_part(kind: str, text: str, train: bool) -> Iterator[Span]:
    if kind == "text":
        yield "text", text, train
        return
    # What the interpreter prints is not in the loss: the model does not say it.
    name, in_loss = ("python", train) if kind == "python" else ("output", False)
    yield "special", f"<|{name}_start|>", in_loss
    yield "text", text, in_loss
    yield "special", f"<|{name}_end|>", in_loss


def _chatml(messages: Messages) -> Iterator[Span]:
    for index, said in enumerate(messages):
        role = "system" if said.role == "developer" else said.role
        in_loss = role == "assistant" and said.train
        yield "special", "<|im_start|>", False
        yield "text", f"{role}\n", False
        yield "text", said.string(index), in_loss
        yield "special", "<|im_end|>", in_loss
        yield "text", "\n", False


def _llama3(messages: Messages) -> Iterator[Span]:
    for index, said in enumerate(messages):
        in_loss = said.role == "assistant" and said.train
        yield "special", "<|start_header_id|>", False
        yield "text", {"tool": "ipython", "developer": "system"}.get(said.role, said.role), False
        yield "special", "<|end_header_id|>", False
        yield "text", "\n\n", False
        yield "text", said.string(index).strip(), in_loss
        yield "special", "<|eot_id|>", in_loss


def _own(messages: Messages, template: Template) -> Iterator[Span]:
    """Read a template of the user's own."""
    turns = {"user": template.user, "assistant": template.assistant, "system": template.system, "tool": template.tool}
    front = None
    for index, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        turn = turns.get(role)
        if turn is None:
            raise ConversationError(f"message {index}: template {template.name!r} has no role {role!r}")
        said = message.string(index)
        if template.strip:
            said = said.strip()
        if role == "system" and template.merge_system:
            if index > 0 or len(messages) == 1 or messages[1].role != "user":
                raise ConversationError(f"message {index}: only message 0, before a user's, may be a system message")
            front = turn.before + said + turn.after
            continue
        if index == 1 and front is not None:
            said = front + said
        in_loss = turn.trained and message.train
        yield from _marked(turn.before, template.special_tokens, False)
        yield "text", said, in_loss
        yield from _marked(turn.end, template.special_tokens, in_loss)
        yield from _marked(turn.after, template.special_tokens, False)


def _marked(text: str, special_tokens: tuple[str, ...], in_loss: bool) -> Iterator[Span]:
    """Yield the special tokens in a template's text, and the texts between them."""
    plain = ""
    while text:
        # The longest that the text begins with: one may begin like another.
        special = max((token for token in special_tokens if text.startswith(token)), key=len, default=None)
        if special is None:
            plain, text = plain + text[0], text[1:]
            continue
        yield "text", plain, in_loss
        yield "special", special, in_loss
        plain, text = "", text[len(special) :]
    yield "text", plain, in_loss


def _hf(record: Record, coder: AnyTokenizer) -> list[tuple[int, bool]]:
    """Let the tokenizer write and encode the whole conversation: that is its one string."""
    if not isinstance(coder, HuggingFaceTokenizer) or coder.chat is None:
        raise ValueError("template='hf' needs a transformers tokenizer. Pass one.")
    said = [(m.role, m.string(index), m.rest, m.train) for index, m in enumerate(record.messages)]
    return chat_of(coder).tokens(said, record.tools, record.template_kwargs)


@functools.lru_cache(maxsize=1)
def chat_of(coder: HuggingFaceTokenizer) -> Chat:
    """Return the chat template of a tokenizer."""
    return Chat(coder)
