"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """On a busy machine the threads of layers as small as these spend their time waiting for one another."""
    torch.set_num_threads(1)
