"""The slow packer's documents: files read whole, records checked, conversations rendered token by token.

    conversations   ->   open_records(), conversation(), render()   ->   tokens (id, trained)
                                                                         reference_packing.py packs them

A part of the definition. It shares nothing with the fast path but the tokenizing of one string and the name
of an error.
"""

from __future__ import annotations

import codecs
import functools
import glob
import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from nanopack.errors import ConversationError
from nanopack.reference.chat import Chat
from nanopack.render.templates import Template
from nanopack.tokenizers.huggingface import HuggingFaceTokenizer
from nanopack.tokenizers.tokenizer import AnyTokenizer

FLOAT32_MAX = 3.4028234663852886e38
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "ipython": "tool",
}

# Reading: where each record stands, and a function that reads it. A broken line errs when its turn comes.

Record = tuple[str, Callable[[], object]]


def open_records(conversations: Any) -> list[Record]:
    """Return for every conversation where it stands, and a function that reads it."""
    paths = [conversations] if isinstance(conversations, (str, os.PathLike)) else conversations
    if isinstance(paths, (list, tuple)) and paths and isinstance(paths[0], (str, os.PathLike)):
        return [record for path in paths for file in _files(os.fspath(path)) for record in _file(file)]
    n = len(conversations)
    return [(f"conversation {index}", partial(conversations.__getitem__, index)) for index in range(n)]


def _files(path: str) -> list[str]:
    # A file that is named like a pattern is meant itself.
    files = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if not files:
        raise ValueError(f"conversations={path!r}: no such file. Pass a path or a pattern that matches.")
    return files


def _file(path: str) -> list[Record]:
    if path.lower().endswith(".parquet"):
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
        return [(f"{path} row {index}", partial(dict, row)) for index, row in enumerate(rows)]
    if not path.lower().endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"conversations={path!r}: unknown kind. Pass .jsonl, .jsonl.gz or .parquet files.")
    data = Path(path).read_bytes()
    data = gzip.decompress(data) if path.lower().endswith(".gz") else data
    lines = data.removeprefix(codecs.BOM_UTF8).split(b"\n")
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    return [(f"{path}:{number}", partial(_parse, line)) for number, line in numbered]


def _parse(line: bytes) -> object:
    # Decoded here: json.loads would guess at UTF-16 too.
    return json.loads(line.decode())


# Checking: every accepted shape becomes (messages, text, weight). Messages are (role, content, what else
# they hold); the template that renders them checks what they are.

Messages = list[tuple[object, object, Mapping[str, Any]]]
Tokens = list[tuple[int, bool]]


def conversation(record: object) -> tuple[Messages, str | None, Tokens | None, float]:
    """Return messages, text, tokens that are ready, and weight of a record; ConversationError where it is none."""
    if isinstance(record, (list, tuple)):
        record = {"messages": record}
    if not isinstance(record, Mapping):
        raise ConversationError(f"it is a {type(record).__name__}; it must be a dict or a list of messages")
    # A Parquet file has every column in every row: what is null is not there.
    shapes = [key for key in ("messages", "conversations", "text", "input_ids") if record.get(key) is not None]
    if len(shapes) != 1:
        raise ConversationError("it must have exactly one of 'messages', 'conversations', 'text' and 'input_ids'")
    weight = 1.0 if record.get("weight") is None else record["weight"]
    if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= float(weight) <= FLOAT32_MAX:
        raise ConversationError(f"weight is {weight!r}; it must be a number from 0 that float32 can hold")
    if shapes == ["messages"]:
        messages = _messages(record["messages"], "role", "content")
        renamed = [("tool" if role == "ipython" else role, content, rest) for role, content, rest in messages]
        return renamed, None, None, float(weight)
    if shapes == ["conversations"]:
        messages = _messages(record["conversations"], "from", "value")
        renamed = [(SHAREGPT_ROLES.get(str(role), role), content, rest) for role, content, rest in messages]
        return renamed, None, None, float(weight)
    if shapes == ["input_ids"]:
        return [], None, _ready(record["input_ids"], record.get("loss_mask")), float(weight)
    if not isinstance(record["text"], str):
        raise ConversationError("its text must be a string")
    return [], record["text"], None, float(weight)


def _ready(ids: Any, mask: Any) -> Tokens:
    # numbers, of whatever array or tensor they come in
    ids, mask = (values.tolist() if hasattr(values, "tolist") else values for values in (ids, mask))
    ids, mask = list(ids), [True] * len(ids) if mask is None else list(mask)
    if not ids or len(ids) != len(mask):
        raise ConversationError(f"it has {len(ids)} input_ids and {len(mask)} entries of loss_mask")
    for id, trained in zip(ids, mask, strict=True):
        if not isinstance(id, Integral) or isinstance(id, bool) or trained not in (0, 1):
            raise ConversationError(f"input_ids has {id!r} with loss_mask {trained!r}")
    return [(int(id), bool(trained)) for id, trained in zip(ids, mask, strict=True)]


def check_ids(tokens: Tokens, vocab_size: int) -> Tokens:
    """Return the tokens; ConversationError where a tokenizer of that size has not all of them."""
    for id, _ in tokens:
        if not 0 <= id < vocab_size:
            raise ConversationError(f"input_ids has {id}; the tokenizer has ids from 0 to {vocab_size - 1}")
    return tokens


def _messages(messages: object, role: str, content: str) -> Messages:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ConversationError("its messages must be a list of at least one")
    found: Messages = []
    for index, message in enumerate(messages):
        calls = isinstance(message, Mapping) and message.get("tool_calls")
        if not isinstance(message, Mapping) or role not in message or (content not in message and not calls):
            raise ConversationError(f"message {index}: it must be a dict with {role!r} and {content!r}")
        # A call of a tool may come without words.
        said = "" if calls and message.get(content) is None else message[content]
        rest = {key: value for key, value in message.items() if key not in (role, content) and value is not None}
        found.append((message[role], said, rest))
    return found


def _string(index: int, content: object) -> str:
    if not isinstance(content, str):
        raise ConversationError(f"message {index}: content is a {type(content).__name__}, not a string")
    return content


# Rendering: a conversation becomes tokens, (id, trained). A template yields what is encoded in one go:
# ("special", the special token, trained) or ("text", the text, trained).

Span = tuple[str, str, bool]


def render(messages: Messages, text: str | None, coder: AnyTokenizer, template: str | Template) -> Tokens:
    """Return the tokens (id, trained) of a conversation."""
    if text is not None:
        spans: Iterator[Span] = iter([("text", text, True)])
    elif template == "hf":
        if not (tokens := _hf(messages, coder)):
            raise ConversationError("its chat template writes nothing")
        return tokens
    elif any(rest.get("tool_calls") for _, _, rest in messages):
        raise ConversationError("a message has tool_calls; no template but 'hf' can write them")
    elif isinstance(template, Template):
        spans = _own(messages, template)
    else:
        spans = {"nanochat": _nanochat, "chatml": _chatml, "llama3": _llama3}[template](messages)
    # Plain text is trained throughout, the first token included.
    tokens = [(coder.bos_id, text is not None)]
    for kind, string, trained in spans:
        # Only a template makes special tokens: what looks like one in a message stays text.
        ids = [coder.special_id(string)] if kind == "special" else _encode(string, coder)
        tokens += [(int(id), trained) for id in ids]
    return tokens


def _encode(text: str, coder: AnyTokenizer) -> Iterable[int]:
    if isinstance(coder, HuggingFaceTokenizer):
        return coder.encode(text)
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
    if len(messages) > 1 and messages[0][0] == "system" and messages[1][0] == "user":
        # A system message has no tokens of its own: it is put before the first question.
        both = _string(0, messages[0][1]) + "\n\n" + _string(1, messages[1][1])
        messages, merged = [("user", both, {}), *messages[2:]], 1
    for index, (role, content, _) in enumerate(messages, start=merged):
        expected = "user" if index % 2 == merged else "assistant"
        if role != expected:
            raise ConversationError(f"message {index}: role is {role!r}; it must be {expected!r} here")
        yield "special", f"<|{role}_start|>", False
        if role == "user":
            yield "text", _string(index, content), False
        elif isinstance(content, (list, tuple)):
            for part in content:
                yield from _nanochat_part(index, part)
        else:
            yield "text", _string(index, content), True
        # The assistant's end is trained: the model must learn to stop.
        yield "special", f"<|{role}_end|>", role == "assistant"


def _nanochat_part(index: int, part: object) -> Iterator[Span]:
    kind, text = (part.get("type"), part.get("text")) if isinstance(part, Mapping) else (None, None)
    if kind not in ("text", "python", "python_output") or not isinstance(text, str):
        raise ConversationError(f"message {index}: a part is not a text, python or python_output with a text")
    if kind == "text":
        yield "text", text, True
        return
    # What the interpreter prints is not trained: the model does not say it.
    name, trained = ("python", True) if kind == "python" else ("output", False)
    yield "special", f"<|{name}_start|>", trained
    yield "text", text, trained
    yield "special", f"<|{name}_end|>", trained


def _chatml(messages: Messages) -> Iterator[Span]:
    for index, (role, content, _) in enumerate(messages):
        if role not in ("system", "user", "assistant", "tool"):
            raise ConversationError(f"message {index}: role is {role!r}; not system, user, assistant or tool")
        yield "special", "<|im_start|>", False
        yield "text", f"{role}\n", False
        yield "text", _string(index, content), role == "assistant"
        yield "special", "<|im_end|>", role == "assistant"
        yield "text", "\n", False


def _llama3(messages: Messages) -> Iterator[Span]:
    for index, (role, content, _) in enumerate(messages):
        if role not in ("system", "user", "assistant", "tool"):
            raise ConversationError(f"message {index}: role is {role!r}; not system, user, assistant or tool")
        yield "special", "<|start_header_id|>", False
        yield "text", "ipython" if role == "tool" else str(role), False
        yield "special", "<|end_header_id|>", False
        yield "text", "\n\n", False
        yield "text", _string(index, content).strip(), role == "assistant"
        yield "special", "<|eot_id|>", role == "assistant"


def _own(messages: Messages, template: Template) -> Iterator[Span]:
    """Read a template of the user's own."""
    turns = {"user": template.user, "assistant": template.assistant, "system": template.system, "tool": template.tool}
    front = None
    for index, (role, content, _) in enumerate(messages):
        turn = turns.get(str(role))
        if turn is None:
            raise ConversationError(f"message {index}: template {template.name!r} has no role {role!r}")
        said = _string(index, content)
        if template.strip:
            said = said.strip()
        if role == "system" and template.merge_system:
            if index > 0 or len(messages) == 1 or messages[1][0] != "user":
                raise ConversationError(f"message {index}: only message 0, before a user's, may be a system message")
            front = turn.before + said + turn.after
            continue
        if index == 1 and front is not None:
            said = front + said
        yield from _marked(turn.before, template.special_tokens, False)
        yield "text", said, turn.trained
        yield from _marked(turn.end, template.special_tokens, turn.trained)
        yield from _marked(turn.after, template.special_tokens, False)


def _marked(text: str, special_tokens: tuple[str, ...], trained: bool) -> Iterator[Span]:
    """Yield the special tokens in a template's text, and the texts between them."""
    plain = ""
    while text:
        # The longest that the text begins with: one may begin like another.
        special = max((token for token in special_tokens if text.startswith(token)), key=len, default=None)
        if special is None:
            plain, text = plain + text[0], text[1:]
            continue
        yield "text", plain, trained
        yield "special", special, trained
        plain, text = "", text[len(special) :]
    yield "text", plain, trained


def _hf(messages: Messages, coder: AnyTokenizer) -> list[tuple[int, bool]]:
    """Let the tokenizer write and encode the whole conversation: that is its one string."""
    if not isinstance(coder, HuggingFaceTokenizer) or coder.chat is None:
        raise ValueError("template='hf' needs a transformers tokenizer. Pass one.")
    said = [(role, _string(index, content), rest, True) for index, (role, content, rest) in enumerate(messages)]
    return chat_of(coder).tokens(said, None, None)


@functools.lru_cache(maxsize=1)
def chat_of(coder: HuggingFaceTokenizer) -> Chat:
    """Return the chat template of a tokenizer."""
    return Chat(coder)
