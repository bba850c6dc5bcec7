"""Keep attention inside a document: the masks that a packed batch needs, made from its tensors.

    Batch.doc_ids   ->   document_mask()       ->   torch's scaled_dot_product_attention
                         document_mask_mod()   ->   FlexAttention's create_block_mask
    Batch.cu_seqlens   ->   variable-length flash attention, unchanged

A token sees itself and the tokens before it in its piece. Padding counts as one piece, so that every row of a mask has
a True and no softmax becomes NaN. Rotary or learned positions come from `Batch.positions`, which restart at each piece.

Flash attention needs no mask: q, k and v of (B, T, heads, size) become `q.flatten(0, 1)`, and both packages take
`cu_seqlens` for queries and keys alike. Its length is the same for all batches; unused entries are B * T, that is,
empty segments. Pass T as the maximum length rather than `batch.max_seqlen`: it always suffices, and as it never
changes, torch.compile sees one shape and compiles once.

    from torch.nn.attention.varlen import varlen_attn            # torch 2.10 or later
    varlen_attn(q, k, v, cu_seqlens, cu_seqlens, T, T, window_size=(-1, 0))

    from flash_attn import flash_attn_varlen_func
    flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, T, T, causal=True)
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def document_mask(doc_ids: torch.Tensor | None) -> torch.Tensor:
    """Return the causal mask within pieces, (B, 1, T, T) bool: True where query (dim 2) may see key (dim 3).

    `doc_ids`: `Batch.doc_ids`, (B, T) int32, -1 in padding; ValueError if None. Pass the mask as `attn_mask` of
    `torch.nn.functional.scaled_dot_product_attention`, without `is_causal`. It takes B * T * T bytes: for long rows use
    FlexAttention or flash attention.

    >>> document_mask(torch.tensor([[0, 0, 1, -1]])).int().tolist()
    [[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]]
    """
    doc_ids = _given(doc_ids)
    return (doc_ids[:, None, :, None] == doc_ids[:, None, None, :]).tril()


def document_mask_mod(
    doc_ids: torch.Tensor | None,
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the same mask as FlexAttention's `mask_mod`, for `create_block_mask(mask_mod, B, None, T, T, device)`."""
    given = _given(doc_ids)

    def mask_mod(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (given[row, query] == given[row, key])

    return mask_mod


def _given(doc_ids: torch.Tensor | None) -> torch.Tensor:
    if doc_ids is None:
        raise ValueError('doc_ids=None: this batch has none; pass extras=("doc_ids",) to the Loader')
    return doc_ids
