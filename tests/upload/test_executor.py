"""Memory for the outputs on the host: used again, and never while anybody holds a tensor that has it."""

from __future__ import annotations

import torch

from nanopack.upload.outputs import HostMemory


def places(tensors):
    return [tensor.data_ptr() for tensor in tensors]


def test_memory_is_used_again_when_nobody_holds_it():
    memory = HostMemory((4, 8), torch.int64)
    place = memory.empty().data_ptr()
    assert [memory.empty().data_ptr() for _ in range(5)] == [place] * 5


def test_memory_is_not_given_out_while_a_tensor_or_anything_of_it_is_held():
    memory = HostMemory((4, 8), torch.float32)
    tensor, viewed, exported, saved = (memory.empty() for _ in range(4))
    taken = places([tensor, viewed, exported, saved])
    view, array = viewed[1:, 2], exported.numpy()
    weight = torch.ones(4, 8, requires_grad=True)
    product = (saved * weight).sum()
    del viewed, exported, saved
    assert not {memory.empty().data_ptr() for _ in range(8)} & set(taken)
    product.backward()
    del view, array, product
    kept = [memory.empty() for _ in range(3)]
    assert set(places(kept)) == set(taken) - {tensor.data_ptr()}


def test_memory_is_aligned_and_of_the_shape_asked_for():
    tensor = HostMemory((3, 5), torch.int32).empty()
    assert (tensor.shape, tensor.dtype) == ((3, 5), torch.int32)
    assert tensor.data_ptr() % 64 == 0 and tensor.is_contiguous()


def test_of_a_heap_of_batches_that_is_let_go_little_is_kept():
    memory = HostMemory((1, 1), torch.int32)
    heap = [memory.empty() for _ in range(100)]
    del heap
    assert len(memory._idle) == 4 and not memory._out
