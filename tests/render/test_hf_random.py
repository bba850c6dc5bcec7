"""Promise of template="hf" in random chats over the chat templates that trl ships: all of each answer, and no more."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from nanopack import ConversationError
from nanopack.conversations.records import check
from nanopack.render.renderer import Renderer
from nanopack.tokenizers.tokenizer import load_tokenizer

pytest.importorskip("transformers", reason="needs transformers: pip install 'nanopack-gpu[hf]'")

from stock_templates import TOOL, folder, make_stock, names

if folder() is None:
    pytest.skip("needs trl, whose chat templates these are: pip install trl", allow_module_level=True)

# Around a word of its own: white space, what looks like a template's text, and what Jinja might take.
AROUND = (
    "{} ",
    "\n{}",
    "{}\n\n",
    "assistant\n{}",
    "{}: user",
    "{} naïve 😀",
    "{}\r\n",
    "<{}>",
    "{{{{ {} }}}}",
    "final {}",
)
AROUND += ("1{}", "{}'", "<think {}", "{}\n</s", "[INST] {}", "{} model\n", "```\n{}\n```", "System: {}", "{} {}")
WORD = re.compile(r"w\d+q")


class Chance(random.Random):
    """Draws chats in which each word stands once."""

    words = 0

    def text(self) -> str:
        self.words += 1
        return self.choice(AROUND).format(f"w{self.words}q", "and")

    def call(self) -> dict[str, Any]:
        function = {"name": "multiply", "arguments": {"a": 7, "unit": self.text()}}
        return {"id": "call00001", "type": "function", "function": function}

    def answer(self, *, thinks: bool) -> dict[str, Any]:
        said: dict[str, Any] = {"role": "assistant", "content": self.text()}
        if self.random() < 0.3:
            said["content"] = [{"type": "text", "text": said["content"]}]
        if thinks and self.random() < 0.5:
            said["reasoning_content"] = self.text()
        if self.random() < 0.1:
            said["weight"] = 0
        return said

    def chat(self) -> list[dict[str, Any]]:
        calls, thinks = self.random() < 0.3, self.random() < 0.3
        chat = [{"role": "system", "content": self.text()}] if self.random() < 0.3 else []
        for _ in range(self.randrange(1, 4)):
            chat.append({"role": "user", "content": self.text()})
            if calls and self.random() < 0.5:
                chat.append({"role": "assistant", "content": "", "tool_calls": [self.call()]})
                result = {"role": "tool", "name": "multiply", "tool_call_id": "call00001", "content": self.text()}
                chat.append(result)
            chat.append(self.answer(thinks=thinks))
        return chat


def words(of: object) -> set[str]:
    return set(WORD.findall(json.dumps(of)))


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_all_that_an_answer_says_and_nothing_of_others_is_in_the_loss(name):
    chance, coder = Chance(name), load_tokenizer(make_stock(name))
    render, rendered = Renderer(coder, "hf"), 0
    for _ in range(60):
        chat = chance.chat()
        try:
            document = render(check({"messages": chat, **({"tools": [TOOL]} if chance.random() < 0.1 else {})}))
        except ConversationError:
            continue
        rendered += 1
        own = [message for message in chat if message["role"] == "assistant" and message.get("weight") != 0]
        others = words([message for message in chat if message not in own])
        said = words([{key: text for key, text in message.items() if key != "reasoning_content"} for message in own])
        last = words(own[-1]) if own and own[-1] is chat[-1] else set()
        in_loss = words(coder.decode(document.ids[document.mask]))
        assert (said | last) <= in_loss <= words(own), chat
        assert not in_loss & others
    # GLM's answers have no end
    assert rendered > 10 or name == "glm4moe"
