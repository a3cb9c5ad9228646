"""What the tests of several rooms share."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Runs in this process must compute what those in processes of their own do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
