"""Each wrong argument is refused at construction, by name, with its value and with what is allowed."""

from __future__ import annotations

import pytest

from nanopack import BestFit, BestFitCrop, BestFitPad, Loader, Pad, Stream

DATA = [{"text": "abc"}]

BAD = [
    ({"batch_size": 0}, "batch_size=0 is not allowed; use an int from 1 upwards"),
    ({"batch_size": 2.0}, "batch_size=2.0 is not allowed; use an int"),
    ({"batch_size": True}, "batch_size=True is not allowed"),
    ({"seq_len": -1}, "seq_len=-1 is not allowed; use an int from 1 upwards"),
    ({"seq_len": "8"}, "seq_len='8' is not allowed"),
    ({"batch_size": 2**16, "seq_len": 2**16}, "batch_size=65536 times seq_len=65536 is 4294967296 tokens per batch"),
    (
        {"batch_size": 2**15, "seq_len": 2**15, "loss_weights": "token"},
        "batch_size=32768 times seq_len=32768 with the tables for weights and extras takes a slot of 10739",
    ),
    ({"packing": "bestfit"}, "packing='bestfit' is not allowed; use one of 'best_fit', 'stream'"),
    ({"packing": "bestfit"}, "'pad', or a packing such as nanopack.BestFit(window=64)"),
    ({"packing": None}, "packing=None is not allowed"),
    ({"packing": BestFit}, "packing=<class 'nanopack.packing.packings.BestFit'> is not allowed"),
    ({"first_assistant": "no"}, "first_assistant='no' is not allowed; use one of 'keep', 'raise', 'drop'"),
    ({"loss": "user"}, "loss='user' is not allowed; use one of 'assistant', 'last', 'all'"),
    ({"loss_weights": "tokens"}, "loss_weights='tokens' is not allowed; use one of None, 'token', 'conversation'"),
    ({"loss_weights": False}, "loss_weights=False is not allowed"),
    ({"extras": "positions"}, "extras='positions' is not allowed; use a tuple"),
    ({"extras": ("position",)}, "'position' is not known; use any of 'positions', 'doc_ids', 'cu_seqlens'"),
    ({"extras": 3}, "extras=3 is not allowed; use a tuple"),
    ({"max_pieces": 0, "extras": ("cu_seqlens",)}, "max_pieces=0 is not allowed with seq_len=2048; use an int from 1"),
    (
        {"max_pieces": 10**13, "seq_len": 8, "extras": ("cu_seqlens",)},
        "max_pieces=10000000000000 is not allowed with seq_len=8; use an int from 1 to 8, or None",
    ),
    ({"max_pieces": 4}, "max_pieces=4 has no meaning without cu_seqlens; leave it out, or add"),
    (
        {"template": "llama"},
        "template='llama' is not allowed; use one of 'nanochat', 'chatml', 'llama3', 'hf', 'hf-training', or a n",
    ),
    ({"max_document_tokens": 0}, "max_document_tokens=0 is not allowed; use an int from 1 upwards, or None"),
    ({"boundary_loss": None}, "boundary_loss=None is not allowed; use True or False"),
    ({"ignore_index": 1.5}, "ignore_index=1.5 is not allowed"),
    ({"ignore_index": 2**63}, f"ignore_index={2**63} is not allowed"),
    ({"rank": 2, "world_size": 2}, "rank=2 is not allowed with world_size=2; use an int from 0 to 1"),
    ({"rank": 0, "world_size": 0}, "world_size=0 is not allowed"),
    ({"rank": 1}, "rank=1, but no world_size; pass both, or neither"),
    ({"world_size": 2}, "world_size=2, but no rank; pass both, or neither"),
    ({"epochs": 0}, "epochs=0 is not allowed; use an int from 1 upwards, or None"),
    ({"epochs": 1.5}, "epochs=1.5 is not allowed"),
    ({"on_error": "ignore"}, "on_error='ignore' is not allowed; use one of 'raise', 'skip'"),
    ({"executor": "cuda"}, "executor='cuda' is not allowed; use 'triton', 'torch' or None"),
    ({"device": "gpu"}, "device='gpu' is not a device of torch"),
    ({"device": "meta"}, "device='meta' is not allowed: only CUDA"),
    ({"prefetch": 0}, "prefetch=0 is not allowed; use an int from 1 upwards"),
    ({"static": 1}, "static=1 is not allowed; use True or False"),
    ({"num_workers": -1}, "num_workers=-1 is not allowed"),
    ({"num_workers": False}, "num_workers=False is not allowed"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[str(arguments) for arguments, _ in BAD])
def test_a_wrong_argument_is_named_with_its_value_and_what_is_allowed(arguments, message):
    with pytest.raises(ValueError) as raised:
        Loader(DATA, "chat32k", **arguments)
    assert message in str(raised.value)


BAD_OPTIONS = [
    (BestFit, {"window": 0}, "window=0 is not allowed; use an int from 1 upwards"),
    (BestFit, {"max_age": 0}, "max_age=0 is not allowed"),
    (BestFit, {"refill": 0}, "refill=0 is not allowed"),
    (BestFitPad, {"window": 1.5}, "window=1.5 is not allowed"),
    (BestFitCrop, {"refill": True}, "refill=True is not allowed"),
    (Stream, {"overlap": 1}, "overlap=1 is not allowed; use True or False"),
]


@pytest.mark.parametrize(("packing", "options", "message"), BAD_OPTIONS)
def test_a_wrong_option_of_a_packing_is_refused_where_it_is_made(packing, options, message):
    with pytest.raises(ValueError) as raised:
        packing(**options)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("name", "packing"),
    [
        ("best_fit", BestFit(window=64, max_age=128, refill=1)),
        ("best_fit_pad", BestFitPad(window=100, refill=1)),
        ("best_fit_crop", BestFitCrop(window=1000, refill=1)),
        ("stream", Stream(overlap=False)),
        ("pad", Pad()),
    ],
)
def test_a_name_stands_for_the_packing_with_its_default_options(name, packing):
    assert Loader(DATA, "chat32k", packing=name).config.packing == packing
    assert Loader(DATA, "chat32k", packing=packing).config.packing is packing


def test_a_tokenizer_without_the_template_s_special_tokens_is_refused_before_the_first_batch():
    with pytest.raises(ValueError, match="im_start"):
        Loader([[{"role": "user", "content": "abc"}]], "chat32k", template="chatml")


def test_more_pieces_than_cu_seqlens_has_room_for_is_an_error_that_names_the_argument():
    loader = Loader([{"text": ""}] * 9, "chat32k", 1, 8, packing="stream", extras=("cu_seqlens",), max_pieces=3)
    with pytest.raises(ValueError, match=r"max_pieces=3 is too small: .* pass max_pieces=8 or more"):
        next(loader)
