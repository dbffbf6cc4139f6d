"""One server of the tiny model with one device, for all tests of this folder."""

import jax
import pytest
from live_servers import LiveServer
from tiny_model import make_tiny_model

from research.config.run_config import MeshConfig
from research.parallel import mesh as meshes
from research.serve.open_models import Capacity, open_models

SLOTS, CONTEXT, QUEUE = 3, 128, 6


def open_tiny(folder, runs=(), roots=()):
    mesh = meshes.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    capacity = Capacity(SLOTS, CONTEXT, 2, 4, QUEUE, 1 << 20)
    return open_models(runs, str(folder), capacity, roots, mesh)


@pytest.fixture(scope="session")
def live(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("served") / "model")
    server = LiveServer(lambda: open_tiny(folder)).ready()
    assert not server.error
    yield server
    server.stop()
    assert not server.error


@pytest.fixture
def server(live):
    """`live`, which every test leaves without work."""
    yield live
    live.idle()
