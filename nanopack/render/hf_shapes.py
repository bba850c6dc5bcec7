"""Render conversations of one shape without their chat template, which has written one such already.

    marked messages   ->   the template, once a shape   ->   Shape   ->   Shapes.plan(): contents in place of marks
                           hf_watch.py says whether it may

A shape is everything but what the messages say: roles, what is in the loss, white space around contents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from nanopack.conversations.records import Conversation
from nanopack.errors import interrupt_in
from nanopack.render.document import END, Plan
from nanopack.render.hf_outline import marks
from nanopack.render.hf_runs import num_bytes
from nanopack.render.hf_watch import Watcher, compiler
from nanopack.tokenizers.added_tokens import AnyWord
from nanopack.tokenizers.buffers import as_buffer, mended_text
from nanopack.tokenizers.byte_level import ByteLevel
from nanopack.tokenizers.huggingface import HuggingFaceTokenizer

# Shapes that are kept: most conversations have that of one before.
MOST_SHAPES = 4096

Key: TypeAlias = tuple[tuple[str, bool, tuple[str, str] | None], ...]
"""Of each message: its role, whether it may be in the loss, and the white space around its content."""
Text: TypeAlias = list[str | int]
"""Texts, and the numbers of the messages whose contents come between them."""
Edge: TypeAlias = tuple[int, list[int]]
"""A place in a text: after this many bytes, and the contents of these messages."""


class Shape(NamedTuple):
    """A plan with places for contents."""

    runs: list[str | bytes]
    """Of the runs that hold contents, nothing."""
    texts: list[tuple[int, Callable[..., str]]]
    """Each run that holds contents, and what makes it of the contents of all messages."""
    in_loss: list[bool]
    """Of each run, whether its tokens are in the loss."""
    spans: list[tuple[int, Edge, Edge]]
    """Run, and from which to before which place of it it is in the loss."""


class Shapes:
    """The shapes of one tokenizer's chat template."""

    def __init__(
        self,
        tokenizer: HuggingFaceTokenizer,
        variables: dict[str, Any],
        looked_for: Sequence[str],
        render: Callable[[list[dict[str, Any]], Conversation], Plan | None],
    ) -> None:
        """`looked_for`: texts that a content must not hold. `render` gives the plan of plain messages."""
        self._tokenizer, self._variables, self._render = tokenizer, variables, render
        self._shapes: dict[Key, Shape | None] = {}
        self._looked_for: set[str] = set()
        self._edges = {token[:k] for token in tokenizer.added_tokens for k in range(1, len(token))}
        self._edges_after = {token[k:] for token in tokenizer.added_tokens for k in range(1, len(token))}
        compile_template, source = compiler(), tokenizer.chat_template()
        self._watcher = Watcher(compile_template(source), source) if compile_template else None
        self._exclude([*looked_for, *tokenizer.added_tokens])

    def _exclude(self, texts: Iterable[str]) -> None:
        if new := {text for text in texts if text} - self._looked_for:
            self._looked_for |= new
            self._excluded = AnyWord(self._looked_for)

    def plan(self, conversation: Conversation) -> tuple[Plan, bool] | None:
        """Return the plan, and whether its shape is new; None where the template itself must write it."""
        if conversation.tools is not None or conversation.template_kwargs is not None or self._watcher is None:
            return None
        found = self._take_apart(conversation)
        if found is None:
            return None
        key, contents = found
        new = key not in self._shapes
        if new:
            if len(self._shapes) >= MOST_SHAPES:
                self._shapes.clear()
            self._shapes[key] = self._shape(key, conversation)
        shape = self._shapes[key]
        if shape is None or (new and any(map(self._excluded.search, contents))):
            return None
        plan = _fill(shape, contents)
        form = self._encoding.form
        if form and not all(self._encoding.is_normal(run) for run in plan.runs if isinstance(run, str)):
            return None
        return plan, new

    @property
    def _encoding(self) -> ByteLevel:
        assert self._tokenizer.byte_level
        return self._tokenizer.byte_level

    def _take_apart(self, conversation: Conversation) -> tuple[Key, list[str]] | None:
        key, contents = [], []
        for message in conversation.messages:
            content = message.content
            if message.rest or not isinstance(content, str):
                return None
            core = content.strip()
            if not core or self._excluded.search(content) or not (content.isascii() or mended_text(content) == content):
                return None
            around = None
            if len(core) != len(content):
                begin = len(content) - len(content.lstrip())
                around = content[:begin], content[begin + len(core) :]
            key.append((message.role, message.train, around))
            contents.append(core)
        return tuple(key), contents

    def _shape(self, key: Key, conversation: Conversation) -> Shape | None:
        """Return the shape of conversations with this key, if they have one."""
        assert self._watcher
        messages = []
        for number, (role, _, around) in enumerate(key):
            before, after = around or ("", "")
            messages.append({"role": role, "content": f"{before}ZQX{number:05}QXZ{after}"})
        try:
            watched = self._watcher.watch(messages, self._variables)
            plan = self._render(messages, conversation) if watched else None
        # A template is a program: what it raises can be anything. It will be said of the conversation itself.
        except Exception as error:
            if isinstance(error, MemoryError) or interrupt_in(error) is not None:
                raise
            return None
        if watched is None or plan is None:
            return None
        self._exclude(watched[1])
        return self._with_places(plan)

    def _with_places(self, plan: Plan) -> Shape | None:
        runs: list[str | bytes] = []
        texts: list[tuple[int, Callable[..., str]]] = []
        in_loss: list[bool] = []
        numbers: dict[int, int] = {}
        for number, (run, trained) in enumerate(zip(plan.runs, plan.in_loss, strict=True)):
            if isinstance(run, str):
                text = _with_numbers(run)
                if self._may_make_tokens(text):
                    return None
                if text != [run]:
                    texts.append((len(runs), _formatter(text)))
                elif all(place != number for place, *_ in plan.spans):
                    run = as_buffer(self._tokenizer.encode_exactly([run])[0])
            if isinstance(run, bytes) and runs and isinstance(runs[-1], bytes) and in_loss[-1] == trained:
                runs[-1] += run
                continue
            numbers[number] = len(runs)
            runs.append(run)
            in_loss.append(trained)
        spans = [
            (numbers[number], _edge(str(plan.runs[number]), begin), self._last_edge(str(plan.runs[number]), end))
            for number, begin, end in plan.spans
        ]
        return Shape(runs, texts, in_loss, spans)

    def _last_edge(self, run: str, byte: int) -> Edge:
        # Where offsets leave blanks out, those at a run's end are in the loss only where the span continues.
        trims = self._encoding.leading is not None
        return (END, []) if byte >= num_bytes(run) + trims else _edge(run, byte)

    def _may_make_tokens(self, text: Text) -> bool:
        """Return whether a content and the text next to it may form an added token."""
        for number, part in enumerate(text):
            if isinstance(part, int):
                if number and isinstance(text[number - 1], int):
                    return True
                continue
            before, after = number > 0, number + 1 < len(text)
            if after and any(part[-k:] in self._edges for k in range(1, len(part) + 1)):
                return True
            if before and any(part[:k] in self._edges_after for k in range(1, len(part) + 1)):
                return True
            if before and after and any(part in token for token in self._tokenizer.added_tokens):
                return True
        return False


def _with_numbers(run: str) -> Text:
    """Return the run with the numbers of messages in place of their marks."""
    text: Text = []
    done = 0
    for number, begin, end in marks(run):
        text += [run[done:begin], number] if begin > done else [number]
        done = end
    return [*text, run[done:]] if done < len(run) else text


def _formatter(text: Text) -> Callable[..., str]:
    """Return the function that puts the contents into the text."""
    parts = [f"{{{part}}}" if isinstance(part, int) else part.replace("{", "{{").replace("}", "}}") for part in text]
    return "".join(parts).format


def _edge(run: str, byte: int) -> Edge:
    """Return the place after this many bytes of a run with marks."""
    whole = run.encode()
    before = whole[:byte].decode()
    found = list(marks(before))
    # a span that continues ends one byte after its run
    count = num_bytes(before) + max(0, byte - len(whole))
    return count - sum(end - begin for _, begin, end in found), [number for number, _, _ in found]


def _fill(shape: Shape, contents: Sequence[str]) -> Plan:
    runs = list(shape.runs)
    for run, format_run in shape.texts:
        runs[run] = format_run(*contents)
    spans = [
        (run, _byte(begin, contents) if begin[1] else begin[0], _byte(end, contents) if end[1] else end[0])
        for run, begin, end in shape.spans
    ]
    return Plan(runs, shape.in_loss, [], spans, is_cut=True)


def _byte(edge: Edge, contents: Sequence[str]) -> int:
    count, numbers = edge
    for number in numbers:
        count += num_bytes(contents[number])
    return count
