"""Bring a record of any accepted shape into one: a Conversation.

    a record, as stored   ->   check()   ->   Conversation   ->   choose()   ->   the renderer makes it a document
       data_sets.py           keys.py: what each key does           loss="last", first_assistant

Nothing is tokenized here. In which order roles may follow each other is the chat template's business (render/).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NoReturn

from nanopack.conversations import keys
from nanopack.conversations.data_sets import Conversations, Dataset, open_conversations
from nanopack.conversations.files import SUFFIXES
from nanopack.conversations.keys import RECORD, SHAPES, Row, bare, is_absent
from nanopack.conversations.lookalikes import looks_like
from nanopack.conversations.messages import (
    ROLES,
    SYSTEM_ROLES,
    Message,
    Part,
    as_list,
    fail,
    is_object_array,
    read_dict,
    read_dicts,
    read_messages,
    read_parts,
    read_text,
    remedy,
)
from nanopack.conversations.source import Source
from nanopack.conversations.tokens import Tokens, plain_tokens, ready_tokens, refuse_unread
from nanopack.errors import ConversationError, describe, short

__all__ = [
    "SUFFIXES",
    "Conversation",
    "ConversationError",
    "Conversations",
    "Dataset",
    "Message",
    "Part",
    "Source",
    "Tokens",
    "check",
    "choose",
    "open_conversations",
    "short",
]

FLOAT32_MAX = 3.4028234663852886e38

_NOTED = frozenset(key for key, kind in RECORD.items() if kind == keys.HARMLESS)
_CHATS = ("messages", "conversations")


# Not frozen, as Message is not.
@dataclass(slots=True)
class Conversation:
    """Messages, or the text of a plain document, or the tokens of one that is rendered already."""

    messages: tuple[Message, ...]
    text: str | None = None
    weight: float = 1.0
    tokens: Tokens | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    """Definitions of tools, for template="hf"."""
    template_kwargs: Mapping[str, Any] | None = None
    """What else the chat template is given, for template="hf"."""
    ignored_keys: tuple[str, ...] = ()
    """Keys that nothing reads, sorted: 'mood', 'message.mood' or 'part.mood'."""


def check(record: object) -> Conversation:
    """Return the conversation of a record of any accepted shape; ConversationError says what is wrong.

    Shapes: {"messages": [...]} or {"conversations": [...]} of {"role", "content"} or {"from", "value"}; that list bare;
    {"prompt", "completion"}, strings or lists of messages, of which the completion is in the loss; Alpaca's
    {"instruction", "input", "output"}; {"text": str}; {"input_ids": ints}, with labels or a loss_mask. keys.py says
    what other keys do. A key that matters and cannot be honoured is an error.

    >>> check({"conversations": [{"from": "human", "value": "hi"}]}).messages
    (Message(role='user', content='hi', rest=None, train=True),)
    """
    if isinstance(record, dict) and len(shapes := record.keys() - _NOTED) == 1:
        # the usual record takes no further look
        value = record[shape := shapes.pop()]
        if (shape in _CHATS and value is not None) or (shape == "text" and type(value) is str):
            found = _chat(value) if shape in _CHATS else Conversation((), value)
            # a plain dict has no columns besides
            return found if type(record) is dict else _with_unread(found, record)
    if type(record) is dict and "input_ids" in record and (of_tokens := _plain(record)) is not None:
        return of_tokens
    if isinstance(record, (list, tuple)) or is_object_array(record):
        return _chat(record)
    if isinstance(record, Conversation):
        # answers.py makes them
        return record
    if not isinstance(record, (dict, Mapping)):
        fail(f"a conversation is a dict or a list of messages, not {describe(record)}{remedy(record)}")
    noted = ((key, bare(value)) for key, value in record.items() if key not in _NOTED)
    held = {key: value for key, value in noted if not _is_missing(key, value)}
    shape = _shape(record, held)
    weight = _weight(held.pop("weight", None))
    if shape == "input_ids":
        found = Conversation((), None, weight, ready_tokens(held))
    elif shape == "text":
        found = Conversation((), read_text(held["text"], "text"), weight)
    elif shape == "prompt":
        found = replace(_prompted(held), weight=weight)
    elif shape == "instruction":
        found = Conversation(_instructed(held), None, weight)
    else:
        found = replace(_chat(held[shape]), weight=weight)
    extras = {key: value for key, value in held.items() if key not in _READ_BY[shape]}
    found = _with_extras(found, extras, shape) if extras else found
    if extras and shape == "input_ids":
        refuse_unread(held, extras)
    return _with_unread(found, record)


def _plain(record: dict[Any, Any]) -> Conversation | None:
    """Return the conversation of a record of tokens that takes no further look: a mask, and perhaps a weight."""
    weight = record.get("weight", 1.0)
    if len(record) != 2 + ("weight" in record) or type(weight) is not float or not 0 <= weight <= FLOAT32_MAX:
        return None
    tokens = plain_tokens(record)
    return None if tokens is None else Conversation((), None, weight, tokens)


def _with_unread(found: Conversation, record: Mapping[str, Any]) -> Conversation:
    unread = record.unread if isinstance(record, Row) else ()
    return replace(found, ignored_keys=tuple(sorted({*found.ignored_keys, *unread}))) if unread else found


# Which keys a shape reads; of kind READ, the others are named as unknown.
_READ_BY: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "text": ("text",),
    "input_ids": ("input_ids", *(key for key, kind in RECORD.items() if kind in (keys.MASK, keys.PACKED))),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "input", "output", "history"),
}
# Which other keys hold what was said before an answer of that shape, so that to ignore them would lose it.
_ALSO_SAID = {"prompt": ("input", "history", "context"), "instruction": ("context",)}
_ALSO_SAID |= {"messages": ("history",), "conversations": ("history",)}


def _is_missing(key: str, value: object) -> bool:
    """Return whether a key of a record counts as absent: an empty text is a text, and an empty list no messages."""
    if RECORD.get(key) in (keys.READ, keys.MASK):
        # pandas writes NaN where a column has nothing
        missing = value is None or type(value).__name__ == "NAType"
        return missing or (isinstance(value, float) and value != value and key != "weight")
    return is_absent(value)


def _shape(record: Mapping[str, object], held: Mapping[str, object]) -> str:
    """Return the key that says of which shape the record is."""
    found = [key for key in ("messages", "conversations", "text", "input_ids") if key in held]
    found += ["prompt"] if "prompt" in held and "completion" in held else []
    found += ["instruction"] if "instruction" in held and "output" in held else []
    if len(found) != 1:
        _fail_shape(record, held, found)
    return found[0]


def _with_extras(found: Conversation, extras: Mapping[str, Any], shape: str) -> Conversation:
    """Return the conversation with the other keys of its record."""
    ignored = set(found.ignored_keys)
    for key, value in extras.items():
        kind = RECORD.get(key)
        if kind in (None, keys.READ, keys.PACKED):
            _check_ignored(key, value, shape)
            ignored.add(str(key))
        elif kind == keys.MASK:
            fail(f"{key} is about input_ids, and the record has {shape}; remove it, or give input_ids instead")
        elif kind == keys.REFUSED:
            fail(f"{key} cannot be honoured: {short(value)}; {_HONOURED.get(key, 'nanopack packs text; remove it')}")
        elif kind == keys.NOT_IN_LOSS:
            _check_masked_role(key, value, shape)
        elif kind == keys.WANTED:
            if _says_no(key, value, shape):
                fail(f"{key} is {value!r}: the answer is not one to learn; remove the record, or rename the key")
        elif not found.messages:
            fail(f"{key} belongs to messages, and the record has {shape}; remove it, or give messages instead")
        elif kind == keys.SYSTEM:
            if found.messages[0].role in SYSTEM_ROLES:
                fail(f"the record has {key} and message 0 is the system's already; remove one of them")
            said = Message("system", value if isinstance(value, str) else read_parts(value, key, ignored))
            found = replace(found, messages=(said, *found.messages))
        elif key == "tools":
            found = replace(found, tools=read_dicts(value, key))
        else:
            # pandas writes None where another record's has a key
            given = {name: one for name, one in read_dict(value, key).items() if one is not None}
            found = replace(found, template_kwargs=given or None)
    return replace(found, ignored_keys=tuple(sorted(ignored)))


def _check_ignored(key: object, value: object, shape: str) -> None:
    """Raise ConversationError where a key that this shape does not read matters, or looks as if it did."""
    if key in _ALSO_SAID.get(shape, ()) and not is_absent(value):
        fail(f"{key} is not read where the record has {shape}: {short(value)}; write it into the {shape}, or remove it")
    if key == "role" and shape in ("text", "input_ids") and isinstance(value, str) and value.strip().lower() in ROLES:
        fail(f"the record is one message, of role {short(value)}; give all of a conversation as messages")
    like = looks_like(str(key), value, "record") if key not in RECORD else ""
    if like in ("loss", "media"):
        fail(f"{key} is not known, and may say what is in the loss or shown: {short(value)}; {_REMOVE}")
    if like:
        fail(f"{key} is not known, and looks like {like}; name it so, or remove it")


def _says_no(key: str, value: object, shape: str) -> bool:
    """Return whether KTO's label says that the answer is a bad one; 0 may also be the number of a class."""
    if isinstance(value, str):
        return value.strip().lower() == "false"
    return value is False or (isinstance(value, Real) and value == 0 and (key == "kto_tag" or shape == "prompt"))


_REMOVE = "nothing here can honour it; remove it"
_HONOURED = {
    "functions": "give them as tools, in the form of today",
    **dict.fromkeys(("train", "training", "trainable", "masked"), "give it to each message, or a weight of 0"),
    **dict.fromkeys(("loss_weight", "loss_weights", "sample_weight"), "name it weight, one number for the record"),
    **dict.fromkeys(
        ("prompt_mask", "action_mask", "label_mask", "token_weights", "label_ids", "target_ids", "decoder_input_ids"),
        "give a loss_mask or labels",
    ),
    **dict.fromkeys(
        ("tool_calls", "function_call", "reasoning", "reasoning_content", "thinking", "thought", "thoughts"),
        "write it into the message that it belongs to",
    ),
    **dict.fromkeys(("chain_of_thought", "cot"), "write it into the answer, or its reasoning_content"),
    **dict.fromkeys(("enable_thinking", "reasoning_effort"), "write it into chat_template_kwargs"),
}


def _check_masked_role(key: str, value: object, shape: str) -> None:
    # NeMo names the role that is not in the loss.
    if shape in ("text", "input_ids") or not isinstance(value, str) or ROLES.get(value.lower()) != "user":
        fail(f"{key} is {short(value)}; say loss_mask or attention_mask for tokens, weight or train for a message")


def _chat(messages: object) -> Conversation:
    ignored: set[str] = set()
    checked = read_messages(messages, ignored)
    return Conversation(checked, ignored_keys=tuple(sorted(ignored)) if ignored else ())


def _prompted(held: Mapping[str, Any]) -> Conversation:
    """Return prompt and completion as messages, of which the completion's are in the loss."""
    prompt, answer = (
        _chat([{"role": role, "content": held[key]}] if isinstance(held[key], str) else held[key])
        for key, role in (("prompt", "user"), ("completion", "assistant"))
    )
    asked = tuple(replace(message, train=False) for message in prompt.messages)
    ignored = sorted({*prompt.ignored_keys, *answer.ignored_keys})
    return Conversation((*asked, *answer.messages), ignored_keys=tuple(ignored))


def _instructed(held: Mapping[str, Any]) -> tuple[Message, ...]:
    """Return an Alpaca record as messages: instruction and input, a line each, are the user's."""
    texts = [read_text(held[key], key) for key in ("instruction", "input") if key in held]
    said = Message("user", "\n".join(text for text in texts if text))
    history: list[Message] = []
    pairs = as_list(held.get("history", ()))
    for pair in map(as_list, pairs if isinstance(pairs, (list, tuple)) else [pairs]):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            fail(f"history must be a list of pairs of strings, not {describe(held['history'])}")
        history += [Message("user", read_text(pair[0], "history")), Message("assistant", read_text(pair[1], "history"))]
    return (*history, said, Message("assistant", read_text(held["output"], "output")))


def _weight(weight: object) -> float:
    if weight is None:
        return 1.0
    # numpy's numbers: the small ones cannot be compared with float32's largest.
    if isinstance(weight, Real) and not isinstance(weight, int):
        weight = float(weight)
    # Beyond float32's largest number a weight would reach the loss as infinity; NaN fails every comparison.
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= FLOAT32_MAX:
        missing = "; pandas writes nan for a missing one: give 1.0" if weight != weight else ""
        fail(f"weight must be a number from 0 to {FLOAT32_MAX:.1e} (float32), not {describe(weight)}{missing}")
    return float(weight)


def choose(conversation: Conversation, loss: str, first_assistant: str) -> Conversation:
    """Return the conversation as these arguments of Loader want it; ConversationError where they refuse it.

    loss="last": of its answers only the last is in the loss. first_assistant: what to do if, but for the system's
    message, it begins with the assistant's: "keep" it so, "raise", "drop" what comes before the first user's message,
    or put an empty user's message there ("empty_user").
    """
    messages = conversation.messages
    if (loss != "last" and first_assistant == "keep") or not messages:
        return conversation
    begin = messages[0].role in SYSTEM_ROLES
    if first_assistant != "keep" and len(messages) > begin and messages[begin].role == "assistant":
        messages = _begun(messages, begin, first_assistant)
    if loss == "last":
        last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=0)
        messages = tuple(replace(m, train=m.train and i == last) for i, m in enumerate(messages))
    return replace(conversation, messages=messages)


def _begun(messages: tuple[Message, ...], begin: int, how: str) -> tuple[Message, ...]:
    if how == "raise":
        fail(
            f"message {begin}: the conversation begins with the assistant; first_assistant='drop' or 'empty_user' helps"
        )
    if how == "empty_user":
        return (*messages[:begin], Message("user", ""), *messages[begin:])
    users = [i for i, message in enumerate(messages) if message.role == "user"]
    if not users:
        fail("nothing is left after first_assistant='drop': no message is the user's")
    return (*messages[:begin], *messages[users[0] :])


def _list_null(null: Sequence[str]) -> str:
    return f": {' and '.join(null)} {'is' if len(null) == 1 else 'are'} null" if null else ""


def _fail_shape(record: Mapping[str, object], held: Mapping[str, object], found: Sequence[str]) -> NoReturn:
    if found:
        fail(f"the record has {' and '.join(found)}; remove all of them but one, or set the others to null")
    null = [key for key in record if key in {*SHAPES, "completion", "output"} and key not in held]
    if "chosen" in held:
        hint = "a preference; to train on chosen, name it messages, or completion next to a prompt"
    elif "prompt" in held:
        hint = "a prompt needs a completion; rename one"
    elif "instruction" in held:
        hint = "an instruction needs an output, and may have an input; rename response and context to these"
    elif "role" in record or "from" in record:
        hint = "this is a message, put it into a list"
    else:
        hint = "remove the record, or fill it in" if null else "rename one"
    whole = "messages, conversations, text, input_ids, prompt with completion, instruction with output"
    fail(f"the record has the keys {short(list(record))}, but none of {whole}{_list_null(null)}; {hint}")
