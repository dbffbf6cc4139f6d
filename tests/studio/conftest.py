"""A studio over an empty folder."""

import pytest
from studio_place import StudioPlace


@pytest.fixture
def place(tmp_path):
    return StudioPlace(tmp_path)
