"""Describe how a chat template turns messages into text: the text around each, and what is in the loss.

    Template   ->   renderer.py plans documents by it
                    config.py accepts one instead of a name

CHATML and LLAMA3 have names. Only data here: nothing is encoded, and no tokenizer is involved.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CHATML", "LLAMA3", "Template", "Turn"]


@dataclass(frozen=True)
class Turn:
    """The text of one role's messages: `before`, the content, `end`, `after`."""

    before: str = ""
    """Never in the loss."""
    end: str = ""
    """In the loss if the content is, so that the model learns to stop; text that must not be belongs in `after`."""
    after: str = ""
    """Never in the loss."""
    trained: bool = False
    """Whether content and `end` are in the loss."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat template: a document is the tokenizer's beginning of sequence and then each message, in any order.

    The texts of a turn may hold special tokens, which must be listed; everything between two of them, and every
    message's content, is encoded on its own as ordinary text. ValueError for an invalid field.

    >>> Template(
    ...     name="dialogue",
    ...     special_tokens=("<|end|>",),
    ...     user=Turn(before="Q: ", after="<|end|>"),
    ...     assistant=Turn(before="A: ", end="<|end|>", trained=True),
    ... ).user.after
    '<|end|>'
    """

    name: str
    """Its name in error messages."""
    special_tokens: tuple[str, ...]
    """The special tokens in the texts below; the tokenizer must have them all."""
    user: Turn
    assistant: Turn
    system: Turn | None = None
    """None: messages of this role are refused."""
    tool: Turn | None = None
    """Results of tools. None: messages of this role are refused."""
    merge_system: bool = False
    """True: only message 0 may be the system's; `system` written around it goes in front of the content of the
    user's message that must follow, and both are encoded as one text."""
    strip: bool = False
    """True: white space around contents is removed."""

    def __post_init__(self) -> None:
        """Raise ValueError for the first invalid field, by name."""
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(
                f"Template name={self.name!r} is not allowed; use a word that error messages can call it by"
            )
        for flag in ("merge_system", "strip"):
            if not isinstance(getattr(self, flag), bool):
                raise ValueError(f"{self._field(flag)}; use True or False")
        tokens = self.special_tokens
        # not a generator, which the check itself would exhaust
        if not isinstance(tokens, (tuple, list)) or not all(isinstance(token, str) and token for token in tokens):
            raise ValueError(f"{self._field('special_tokens')}; use a tuple of strings, none of them empty")
        object.__setattr__(self, "special_tokens", tuple(tokens))
        for role in ("user", "assistant", "system", "tool"):
            self._check_turn(role)
        if self.merge_system and (self.system is None or self.system.trained or self.system.end):
            raise ValueError(
                f"{self._field('merge_system')} with system={self.system!r}; give a Turn that has only before and after"
            )
        for text in (self.system.before, self.system.after) if self.merge_system and self.system else ():
            for token in self.special_tokens:
                if token in text:
                    raise ValueError(
                        f"{self._field('merge_system')}: {token!r} in system is inside the user's text, which is "
                        "encoded as ordinary text; write it into before or after of user"
                    )

    def turns(self) -> dict[str, Turn]:
        """Return the turn of each accepted role."""
        turns = {"system": self.system, "user": self.user, "assistant": self.assistant, "tool": self.tool}
        return {role: turn for role, turn in turns.items() if turn is not None}

    def _field(self, name: str) -> str:
        return f"Template {self.name!r}: {name}={getattr(self, name)!r} is not allowed"

    def _check_turn(self, role: str) -> None:
        turn = getattr(self, role)
        if turn is None and role in ("system", "tool"):
            return
        if not isinstance(turn, Turn):
            or_none = ", or None" if role in ("system", "tool") else ""
            raise ValueError(f"{self._field(role)}; use a nanopack.Turn{or_none}")
        texts = (turn.before, turn.end, turn.after)
        if not all(isinstance(text, str) for text in texts) or not isinstance(turn.trained, bool):
            raise ValueError(f"{self._field(role)}; before, end and after are strings, trained is True or False")


def _chatml(role: str, *, trained: bool = False) -> Turn:
    return Turn(before=f"<|im_start|>{role}\n", end="<|im_end|>", after="\n", trained=trained)


def _llama3(role: str, *, trained: bool = False) -> Turn:
    return Turn(before=f"<|start_header_id|>{role}<|end_header_id|>\n\n", end="<|eot_id|>", trained=trained)


CHATML = Template(
    name="chatml",
    special_tokens=("<|im_start|>", "<|im_end|>"),
    system=_chatml("system"),
    user=_chatml("user"),
    assistant=_chatml("assistant", trained=True),
    tool=_chatml("tool"),
)
# Meta's: contents are trimmed, and the role of tool results is called ipython.
LLAMA3 = Template(
    name="llama3",
    special_tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    system=_llama3("system"),
    user=_llama3("user"),
    assistant=_llama3("assistant", trained=True),
    tool=_llama3("ipython"),
    strip=True,
)
