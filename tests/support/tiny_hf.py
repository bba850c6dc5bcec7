"""A tokenizer of Hugging Face, chat templates, a tiny Llama and a loader for it, all made here: no network."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

from data_sets import SHIPPED

# `python -m pytest` puts the checkout on the path, where transformers takes the folder kernels/ for PyPI's package.
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).parents[2]]

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# Jinja would drop a newline after a block as the template's own layout.
HEADER = "<|im_start|>{{ message['role'] }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# ChatML, as most models write it: nothing marked.
PLAIN = (
    "{% for message in messages %}" + HEADER + "{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}" + PROMPT
)  # fmt: skip
# The same, with the part in the loss marked.
MARKED = (
    "{% for message in messages %}" + HEADER + "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}" + PROMPT
)  # fmt: skip
# Only the last answer keeps its thoughts, so that what follows changes what stands before.
FORGETFUL = (
    "{% for message in messages %}" + HEADER +
    "{% if loop.last and message['role'] == 'assistant' %}thought {% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}" + PROMPT
)  # fmt: skip
# Calls of tools are written, and roles must begin with the user's.
CALLS = (
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    "{% for message in messages %}" + HEADER + "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}{% for call in message['tool_calls'] or [] %}{{ call['function']['name'] }}{% endfor %}"
    "<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}" + PROMPT
)  # fmt: skip


def shipped(count: int) -> list[dict[str, Any]]:
    """The first shipped conversations whose contents are all strings."""
    records = [json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").splitlines()]
    return [r for r in records if all(isinstance(m["content"], str) for m in r.get("messages", []))][:count]


@functools.cache
def make_core() -> Any:
    """Return a byte-level BPE of 1,000 tokens as a bare `tokenizers.Tokenizer`; `<think>` is added, not special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    # As many real ones have it: offsets without the white space in front.
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    texts = (message["content"] for record in shipped(1000) for message in record.get("messages", []))
    core.train_from_iterator(texts, trainer)
    core.add_tokens([AddedToken("<think>", special=False)])
    return core


def make_tokenizer(chat_template: str | None = None, **settings: Any) -> Any:
    """Return a `transformers.PreTrainedTokenizerFast` around it."""
    from transformers import PreTrainedTokenizerFast

    defaults = {"tokenizer_object": make_core(), "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(**{**defaults, **settings})
    tokenizer.chat_template = chat_template
    return tokenizer


# How sentencepiece-like tokenizers put a space in front: Llama 2 and Mistral 0.1 (legacy), later ones, and not at all.
SPACED = ("prepend", "always", "first", "never")


@functools.cache
def make_spaced(how: str, chat_template: str | None = None) -> Any:
    """Return a tokenizer with byte fallback whose words begin with '▁'; `how` of SPACED says where it adds one."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if how == "prepend":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=how, split=False)
    blank = decoders.Replace("▁", " ")
    core.decoder = decoders.Sequence([blank, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *SPECIAL_TOKENS, "<|user_start|>", "<|user_end|>", "<|assistant_start|>"]
    special += ["<|assistant_end|>", "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    words = (word for record in shipped(200) for m in record["messages"] for word in m["content"].split(" "))
    core.train_from_iterator(words, trainer)
    # Bytes are no special tokens, but what the model falls back to.
    settings = json.loads(core.to_str())
    settings["added_tokens"] = [t for t in settings["added_tokens"] if t["content"] in special]
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(settings)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


DATA = [*shipped(120), {"text": "Once upon a time."}, {"text": "The end."}]


def make_model(attention: str = "sdpa", dtype: Any = None, **settings: Any) -> Any:
    """Return a tiny Llama with random weights, always the same."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1001,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attn_implementation=attention,
        **settings,
    )
    return LlamaForCausalLM(config).to(dtype or torch.float32)


def arguments_of(**changes: Any) -> dict[str, Any]:
    """Return the arguments that `make_loader` passes to Loader; `nanopack.reference.batches` takes them too."""
    return {"batch_size": 4, "seq_len": 127, "extras": ("positions",), "template": "hf", **changes}


def make_loader(conversations: Any = DATA, **arguments: Any) -> Any:
    from nanopack import Loader

    arguments = arguments_of(**{"num_workers": 0, **arguments})
    return Loader(conversations, make_tokenizer(MARKED), device="cpu", **arguments)
