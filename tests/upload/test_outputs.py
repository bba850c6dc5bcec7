"""Host memory for the outputs: reused, but never while a tensor still refers to it."""

from __future__ import annotations

import sys
import tracemalloc

import torch

from nanopack.upload.outputs import HostMemory


def places(tensors):
    return [tensor.data_ptr() for tensor in tensors]


def test_memory_is_reused_once_no_tensor_refers_to_it():
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


def test_of_many_batches_that_are_let_go_at_most_four_stay_allocated():
    size = 1 << 20
    memory = HostMemory((size // 4,), torch.int32)
    tracemalloc.start()
    try:
        batches = [memory.empty() for _ in range(50)]
        assert tracemalloc.get_traced_memory()[0] > 50 * size
        del batches
        assert tracemalloc.get_traced_memory()[0] < 5 * size
    finally:
        tracemalloc.stop()


def test_no_function_of_ours_runs_where_a_batch_dies_in_which_a_ctrl_c_would_be_lost():
    memory, called = HostMemory((4, 8), torch.int64), []
    tensor = memory.empty()
    place = tensor.data_ptr()
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name) if event == "call" else None)
    try:
        del tensor
    finally:
        sys.setprofile(None)
    assert not called and not memory._out
    assert memory.empty().data_ptr() == place
