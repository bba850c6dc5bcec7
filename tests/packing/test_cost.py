"""The cost of documents: what published counts of parameters and FLOPs say of models whose sizes are known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nanopack.packing.cost import Cost, ModelSizes, as_cost

LLAMA_3_8B = ModelSizes(layers=32, hidden=4096, heads=32, kv_heads=8, mlp=14336, vocab=128256)
GPT_2 = ModelSizes(layers=12, hidden=768, heads=12, mlp=3072, gated=False, vocab=50257)
QWEN_2_5_7B = ModelSizes(layers=28, hidden=3584, heads=28, kv_heads=4, mlp=18944, vocab=152064)
QWEN_3_30B_A3B = ModelSizes(
    layers=48, hidden=2048, heads=32, kv_heads=4, head_dim=128, mlp=768, experts_per_token=8, vocab=151936
)


def test_llama_3_8b_by_hand():
    # 8,030,261,248 parameters: without 65 norms of 4096 and the input embeddings these are its matrices
    matrices = 8_030_261_248 - 65 * 4096 - 128256 * 4096
    cost = LLAMA_3_8B.cost()
    assert cost.per_token == 6 * matrices
    # 4 multiply-adds of FLOPs a pair, channel and layer, half of them masked, three passes
    assert cost.per_pair == 3 * 4 * 32 * 4096 / 2
    assert cost.per_token / cost.per_pair == pytest.approx(57_000, rel=0.01)


def test_gpt_2_by_its_parameters():
    # 124,439,808 parameters; what is no matrix: positions, the biases and the norms
    biases = 12 * (3 * 768 + 768 + 3072 + 768 + 4 * 768) + 2 * 768
    # its embeddings are its head
    assert GPT_2.cost().per_token == 6 * (124_439_808 - 1024 * 768 - biases)


def test_qwen_by_its_published_parameters():
    # "Number of Parameters (Non-Embedding): 6.53B"
    assert QWEN_2_5_7B.cost().per_token / 6 - 3584 * 152064 == pytest.approx(6.53e9, rel=1e-3)


def test_a_mixture_of_experts_costs_what_is_active():
    # "3.3B activated", its input and output embeddings counted
    assert QWEN_3_30B_A3B.cost().per_token / 6 + 2048 * 151936 == pytest.approx(3.3e9, rel=0.02)


@pytest.mark.parametrize(("layers", "hidden"), [(96, 12288), (24, 2304), (128, 25600)])
def test_the_formula_of_narayanan_et_al(layers, hidden):
    """Equation 3 without the recomputed pass, 72 B s l h^2 (1 + s / 6h + V / 12lh); its attention is not causal."""
    s, vocab = 2048, 51200
    published = 72 * s * layers * hidden**2 * (1 + s / (6 * hidden) + vocab / (12 * layers * hidden))
    sizes = ModelSizes(
        layers=layers, hidden=hidden, heads=96 if hidden % 96 == 0 else 128, mlp=4 * hidden, gated=False, vocab=vocab
    )
    cost = sizes.cost()
    assert cost.per_token * s + 2 * cost.per_pair * s * s == pytest.approx(published, rel=1e-12)


def test_the_same_from_configs_of_transformers():
    pytest.importorskip("transformers")
    import tiny_hf  # noqa: F401  (takes the checkout off the path, where transformers would find the folder kernels/)
    import transformers

    llama = transformers.LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
        vocab_size=128256,
    )  # fmt: skip
    moe = transformers.Qwen3MoeConfig(
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        moe_intermediate_size=768, num_experts_per_tok=8, vocab_size=151936,
    )  # fmt: skip
    assert as_cost(llama) == LLAMA_3_8B.cost()
    assert as_cost(transformers.GPT2Config()) == GPT_2.cost()
    assert as_cost(moe) == QWEN_3_30B_A3B.cost()


# two matrices an MLP, three, and without an intermediate_size
@pytest.mark.parametrize(
    "kind",
    [
        *("nanochat", "gpt_neox", "phi", "starcoder2", "nemotron", "arcee", "apertus", "persimmon", "jais2", "biogpt"),
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "olmo2", "bloom"),
    ],
)
def test_the_cost_of_a_config_is_that_of_the_matrices_of_its_model(kind):
    transformers = pytest.importorskip("transformers")
    import tiny_hf  # noqa: F401  (as above)
    import torch

    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, vocab_size=160)
    config = transformers.CONFIG_MAPPING[kind](**shape, pad_token_id=0, sliding_window=None)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    matrices = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert as_cost(config).per_token == 6 * sum(matrix.weight.numel() for matrix in matrices)


CONFIG = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=9, intermediate_size=32)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"sliding_window": 4}, "sliding_attention"),
        ({"kv_lora_rank": 4}, "latent attention"),
        ({"is_encoder_decoder": True}, "an encoder"),
    ],
)
def test_attention_that_the_formula_does_not_fit_is_refused(more, what):
    with pytest.raises(ValueError, match=f"{what}, .*pass a pair"):
        as_cost(SimpleNamespace(**CONFIG, **more))


@pytest.mark.parametrize(
    "more",
    [
        {"layer_types": ["full_attention"], "sliding_window": 4},
        {"sliding_window": 4, "use_sliding_window": False},
        {"sliding_window": None, "kv_lora_rank": None, "is_encoder_decoder": False},
    ],
)
def test_a_window_that_no_layer_uses_is_no_reason(more):
    assert as_cost(SimpleNamespace(**CONFIG, **more)) == as_cost(SimpleNamespace(**CONFIG))


def test_the_sizes_of_a_config_are_those_of_its_text_config():
    inner = SimpleNamespace(**CONFIG)
    assert as_cost(SimpleNamespace(get_text_config=lambda: inner, vision_config={})) == as_cost(inner)


def test_a_config_without_a_size_is_refused_by_its_name():
    lacking = {name: value for name, value in CONFIG.items() if name != "num_attention_heads"}
    with pytest.raises(ValueError, match=r"of a 'rwkv' lacks num_attention_heads; pass a nanopack\.ModelSizes"):
        as_cost(SimpleNamespace(**lacking, model_type="rwkv"))


def test_a_pair_is_the_cost():
    assert as_cost((3, 0.5)) == as_cost([3, 0.5]) == Cost(3.0, 0.5)
    assert Cost(3.0, 0.5).of(tokens=7, squares=25) == 33.5


@pytest.mark.parametrize(
    "wrong", [(1,), (1, 2, 3), (0, 0), (-1, 2), (1, float("nan")), (1, float("inf")), "llama", 5, (True, 1)]
)
def test_anything_else_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match="balance="):
        as_cost(wrong)
