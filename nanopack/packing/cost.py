"""What a document costs a model: a * L + b * L^2 for L tokens, since each attends to those before it.

    (a, b), ModelSizes or a transformers config   ->   as_cost()   ->   Cost: balance.py deals rows by it

From sizes, the cost is in FLOPs of a training step, two for each multiply-add: a matrix of n weights takes 2 n a token
forward and 4 n backward, and so do the two products of attention, of which a causal mask leaves half (Narayanan et al.,
arXiv:2104.04473, appendix; PaLM, arXiv:2204.02311, appendix B, without its causal half). Norms, activations, rotary
embeddings and the look-up of input embeddings are left out, as there, and so is recomputing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from nanopack.checks import check_bool, check_int

PASSES = 3  # forward, and backward for the inputs and for the weights

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

# Model types of transformers with an intermediate_size whose MLP has two matrices instead of three.
_NOT_GATED = {
    *("nanochat", "gpt_neox", "phi", "starcoder2", "nemotron", "arcee", "apertus", "persimmon", "jais2", "biogpt"),
}


class Cost(NamedTuple):
    """The cost of documents: `per_token` * L + `per_pair` * L^2 for each, of L tokens."""

    per_token: float
    per_pair: float

    def of(self, tokens: Any, squares: Any) -> Any:
        """Return the cost of documents with this sum of lengths, and of their squares, or an array for arrays.

        The sums are integers, so that the result does not depend on the order of the documents.
        """
        return self.per_token * tokens + self.per_pair * squares


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The sizes of a decoder-only transformer from which its cost follows.

    >>> ModelSizes(layers=32, hidden=4096, heads=32, kv_heads=8, mlp=14336, vocab=128256).cost()
    Cost(per_token=45027950592.0, per_pair=786432.0)
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int | None = None
    """None: as many as `heads`."""
    head_dim: int | None = None
    """None: hidden // heads."""
    mlp: int
    """Inner size of the MLP, or of one expert."""
    gated: bool = True
    """Whether the MLP has three matrices (SwiGLU) or two."""
    experts_per_token: int = 1
    """Experts of a mixture that each token goes through."""
    vocab: int

    def __post_init__(self) -> None:
        """Raise ValueError for a size that is not an int from 1."""
        for name in ("layers", "hidden", "heads", "mlp", "experts_per_token", "vocab"):
            check_int(name, getattr(self, name), least=1)
        for name in ("kv_heads", "head_dim"):
            check_int(name, getattr(self, name), least=1, or_none=True)
        check_bool("gated", self.gated)

    def cost(self) -> Cost:
        """Return the cost in FLOPs of a training step: forward and backward, attention causal, the head included."""
        kv_heads, head_dim = self.kv_heads or self.heads, self.head_dim or self.hidden // self.heads
        attention = 2 * self.hidden * head_dim * (self.heads + kv_heads)
        mlp = (3 if self.gated else 2) * self.hidden * self.mlp * self.experts_per_token
        weights = self.layers * (attention + mlp) + self.hidden * self.vocab
        # queries by keys and probabilities by values: 2 multiply-adds a pair and channel, half the pairs masked
        return Cost(float(PASSES * 2 * weights), float(PASSES * 2 * self.layers * self.heads * head_dim))


Balance: TypeAlias = "tuple[float, float] | ModelSizes | Any"
"""A pair (a, b), the sizes of a model, or a transformers config."""


def as_cost(balance: Balance) -> Cost:
    """Return the cost that `balance` means. ValueError where it means none.

    >>> as_cost((57_000, 1)).of(tokens=2, squares=4)
    114004.0
    """
    if isinstance(balance, ModelSizes):
        return balance.cost()
    # a config of several models, such as of text and vision, has its sizes further in
    if hasattr(balance, "num_hidden_layers") or hasattr(balance, "get_text_config"):
        return sizes_of(balance).cost()
    numbers = tuple(balance) if isinstance(balance, (tuple, list)) else ()
    if len(numbers) != 2 or not all(_is_amount(number) for number in numbers) or not any(numbers):
        raise ValueError(
            f"balance={balance!r} is not allowed; use a pair (a, b) of finite numbers from 0, not both 0, for the cost "
            f"a * L + b * L^2 of a document of L tokens; a nanopack.ModelSizes; or a transformers config"
        )
    return Cost(float(numbers[0]), float(numbers[1]))


def _is_amount(number: object) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and 0 <= number < math.inf


def sizes_of(config: Any) -> ModelSizes:
    """Return the sizes in a transformers config.

    ValueError where it lacks one, or says that the attention is not causal attention to all tokens before.

    Read by name alone: hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
    intermediate_size (without one: 4 * hidden_size, two matrices, as GPT-2), vocab_size, and for experts
    num_experts_per_tok and moe_intermediate_size; shared experts are not counted.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind = f"balance: the config of a {getattr(config, 'model_type', 'model')!r}"
    if other := _other_attention(config):
        raise ValueError(
            f"{kind} has {', '.join(sorted(other))}, for which this formula is wrong; pass a pair (a, b), for the cost "
            f"a * L + b * L^2"
        )
    if missing := [name for name in _SIZES if not hasattr(config, name)]:
        raise ValueError(f"{kind} lacks {', '.join(missing)}; pass a nanopack.ModelSizes, or a pair (a, b)")
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", None)
    experts = getattr(config, "num_experts_per_tok", None) or 1
    return ModelSizes(
        layers=config.num_hidden_layers,
        hidden=hidden,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None),
        head_dim=getattr(config, "head_dim", None),
        mlp=getattr(config, "moe_intermediate_size", None) or inner or 4 * hidden,
        gated=inner is not None and getattr(config, "model_type", "") not in _NOT_GATED,
        experts_per_token=experts,
        vocab=config.vocab_size,
    )


def _other_attention(config: Any) -> set[str]:
    """Return the kinds of attention in a config that are not causal attention to all tokens before."""
    layers = getattr(config, "layer_types", None)
    other = {*(layers or ())} - {"full_attention"}
    # where the layers are listed they say whether the window is used
    if layers is None and getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        other.add("sliding_attention")
    if getattr(config, "kv_lora_rank", None):
        other.add("latent attention")
    if getattr(config, "is_encoder_decoder", False):
        other.add("an encoder")
    return other
