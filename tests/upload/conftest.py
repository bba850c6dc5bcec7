"""Settings for the tests of this folder."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors of eight elements gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
