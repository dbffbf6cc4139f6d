"""A studio over an empty folder."""

import tempfile
from pathlib import Path

import pytest
from studio_place import StudioPlace


@pytest.fixture
def site(tmp_path):
    return StudioPlace(tmp_path)


@pytest.fixture
def socket_folder():
    """A folder with a short name: the path of a socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
