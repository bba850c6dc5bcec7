"""A packed batch trains as its documents would alone: nothing of one reaches another."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from nanopack import Loader, demo
from nanopack.attention import document_mask, document_mask_mod
from nanopack.packing import BestFit

EXTRAS = ("positions", "doc_ids", "cu_seqlens")
ROWS, COLUMNS = 2, 128


def first_batch(packing, batch_size=ROWS, **more):
    conversations = [c for c in demo.shipped() if c["source"] == "arithmetic"][:12]
    # every token of a document but its first is a target, so that every attention shows
    loss = {"loss": "all", "boundary_loss": False}
    with Loader(
        conversations, "chat32k", batch_size, COLUMNS, packing=packing, extras=EXTRAS, **loss, **more
    ) as loader:
        return next(loader)


@pytest.fixture(scope="module")
def batch():
    found = first_batch("best_fit")
    assert (found.doc_ids == -1).any() and (found.doc_ids == 1).any()
    return found


@pytest.fixture(scope="module")
def qkv():
    torch.manual_seed(1)
    return torch.randn(3, ROWS, 4, COLUMNS, 16, dtype=torch.float64)


def losses_of_documents(model, batch, mask):
    """Return the sum of the losses of each conversation, by its index."""
    logits = model(batch.inputs, batch.positions, mask)
    losses = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    sums = defaultdict(float)
    for row, pieces in zip(losses.reshape(batch.inputs.shape), batch.pieces, strict=True):
        for piece in pieces:
            sums[piece.conversation] += row[piece.start : piece.start + piece.length].sum().item()
    return sums


def differences(mask_of):
    """Return by how much the loss of each document differs, packed with others and alone in its row."""
    torch.manual_seed(2)
    model = demo.GPT(32768).double()
    # as it is made, the head gives every token the same
    torch.nn.init.normal_(model.head.weight, std=0.1)
    packed, alone = first_batch("best_fit"), first_batch("pad", batch_size=12)
    with torch.no_grad():
        together = losses_of_documents(model, packed, mask_of(packed))
        apart = losses_of_documents(model, alone, mask_of(alone))
    assert len(together) > ROWS and together.keys() <= apart.keys()
    return [abs(together[conversation] - apart[conversation]) for conversation in together]


def causal(batch):
    return torch.ones(COLUMNS, COLUMNS, dtype=torch.bool).tril()


def test_a_packed_batch_has_the_losses_of_its_documents_alone():
    # float64: sums over more keys, of which some weigh 0, may round otherwise; about 1e-12 of a loss near 500
    assert max(differences(lambda batch: document_mask(batch.doc_ids))) < 1e-9


def test_without_the_mask_documents_leak_into_each_other():
    assert max(differences(causal)) > 1e-2


def test_a_token_sees_itself_and_what_stands_before_it_in_its_document(batch):
    mask = document_mask(batch.doc_ids)
    assert (mask.shape, mask.dtype) == ((ROWS, 1, COLUMNS, COLUMNS), torch.bool)
    for row in range(ROWS):
        ids = batch.doc_ids[row].tolist()
        expected = [[k <= q and ids[k] == ids[q] for k in range(COLUMNS)] for q in range(COLUMNS)]
        assert mask[row, 0].tolist() == expected


def test_padding_makes_nothing_nan(batch, qkv):
    seen = functional.scaled_dot_product_attention(*qkv, attn_mask=document_mask(batch.doc_ids))
    assert (batch.doc_ids == -1).any() and seen.isfinite().all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_has_the_same_mask(batch, qkv):
    mask_mod, mask = document_mask_mod(batch.doc_ids), document_mask(batch.doc_ids)
    assert torch.equal(create_mask(mask_mod, ROWS, 1, COLUMNS, COLUMNS, "cpu"), mask)
    blocks = create_block_mask(mask_mod, ROWS, None, COLUMNS, COLUMNS, "cpu", BLOCK_SIZE=16)
    assert torch.equal(blocks.to_dense().bool(), mask.unflatten(2, (-1, 16)).unflatten(4, (-1, 16)).any(3).any(4))
    expected = functional.scaled_dot_product_attention(*qkv, attn_mask=mask)
    # float64: the same sums in another order
    torch.testing.assert_close(flex_attention(*qkv, block_mask=blocks), expected, rtol=0, atol=1e-12)


def test_cu_seqlens_cut_the_batch_into_the_same_documents(batch, qkv):
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in qkv)
    got = varlen_attention(q, k, v, batch.cu_seqlens)
    expected = functional.scaled_dot_product_attention(*qkv, attn_mask=document_mask(batch.doc_ids))
    # float64: the same sums in another order
    torch.testing.assert_close(got, expected.transpose(1, 2).flatten(0, 1), rtol=0, atol=1e-12)


def varlen_attention(q, k, v, cu_seqlens):
    """Emulate causal variable-length flash attention: each segment of q, k, v (tokens, heads, size) on its own."""
    segments = []
    for start, stop in zip(cu_seqlens.tolist()[:-1], cu_seqlens.tolist()[1:], strict=True):
        q1, k1, v1 = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        assert stop - start <= COLUMNS
        if stop > start:
            segments.append(functional.scaled_dot_product_attention(q1, k1, v1, is_causal=True).transpose(0, 1))
    return torch.cat(segments)


def test_cu_seqlens_are_as_long_in_every_batch_so_that_nothing_compiles_twice():
    shapes = {first_batch(BestFit(window=window)).cu_seqlens.shape for window in (1, 4, 12)}
    assert shapes == {(ROWS * (COLUMNS // 8 + 1) + 1,)}


@pytest.mark.parametrize("make", [document_mask, document_mask_mod])
def test_a_batch_without_doc_ids_is_refused_with_what_to_ask_for(make):
    with pytest.raises(ValueError, match=r'pass extras=\("doc_ids",\) to the Loader'):
        make(None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: flash attention of torch")
def test_flash_attention_of_torch_agrees(batch, qkv):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    heads = qkv.to("cuda", torch.bfloat16)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in heads)
    cu_seqlens = batch.cu_seqlens.cuda()
    got = varlen.varlen_attn(q, k, v, cu_seqlens, cu_seqlens, COLUMNS, COLUMNS, window_size=(-1, 0))
    expected = functional.scaled_dot_product_attention(*heads, attn_mask=document_mask(batch.doc_ids.cuda()))
    # bfloat16 has 8 bits
    torch.testing.assert_close(got, expected.transpose(1, 2).flatten(0, 1), rtol=2e-2, atol=2e-2)
