"""Memory that new tensors share with older ones, and never with living ones."""

import gc

import pytest
import torch

from expertdiff.memory import SMALL, Memory

CPU = torch.device("cpu")
N = SMALL  # float32 numbers: four times what is small


def test_a_tensor_lies_where_one_lay_that_is_gone():
    memory = Memory()
    x = memory.empty((N,), torch.float32, CPU)
    place = x.data_ptr()
    del x
    y = memory.empty((2, 128, N // 128), torch.bfloat16, CPU)
    assert y.data_ptr() == place and y.shape == (2, 128, N // 128) and y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "rest", [lambda x: x, lambda x: x[:1].detach(), lambda x: x.numpy()], ids=["all", "1", "numpy"]
)
def test_what_is_left_of_a_tensor_is_not_written_over(rest):
    memory = Memory()
    left = rest(memory.empty((N,), torch.float32, CPU).fill_(1))
    gc.collect()
    memory.empty((N,), torch.float32, CPU).fill_(2)
    assert left[0] == 1


def test_other_sizes_and_small_ones_have_memory_of_their_own():
    memory = Memory()
    x = memory.empty((N,), torch.float32, CPU)
    place = x.data_ptr()
    del x
    assert memory.empty((N + 1,), torch.float32, CPU).data_ptr() != place
    assert memory.empty((3,), torch.float32, CPU).untyped_storage().nbytes() == 12


def test_tensors_outlive_the_memory():
    memory = Memory()
    x = memory.empty((N,), torch.float32, CPU).fill_(1)
    del memory
    gc.collect()
    assert (x == 1).all()
