"""What all tests share."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """On a busy machine the threads of layers as small as these spend their time waiting for one
    another.
    """
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Derived data go to a folder of this session, also those of the programs that tests start."""
    before = os.environ.get("SFUMATO_CACHE")
    os.environ["SFUMATO_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["SFUMATO_CACHE"]
    else:
        os.environ["SFUMATO_CACHE"] = before
