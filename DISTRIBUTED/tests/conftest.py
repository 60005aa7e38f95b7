"""What the tests of ranks share: a process that starts them; see ranks.py."""

import sys
from pathlib import Path

import pytest
from nursery import Nursery

sys.path.append(str(Path(__file__).parent))

from ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with Nursery(SQUAD_CACHE=str(folder / "cache")) as nursery:
        yield Ranks(nursery, folder)
