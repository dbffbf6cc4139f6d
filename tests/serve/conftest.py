"""One server of the tiny model with one device, for all tests of this folder."""

import json
import shutil

import pytest
from live_servers import LiveServer, open_tiny
from tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def runs(place, unbroken, tmp_path_factory):
    """A folder with copies of the run that others end with, as it is and behind."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(place.run_dir("unbroken"), folder / "tuned")
    behind = shutil.copytree(place.run_dir("unbroken"), folder / "behind")
    for step in place.saved_steps("unbroken")[1:]:
        shutil.move(behind / "checkpoints" / str(step), folder / str(step))
    other = shutil.copytree(behind, folder / "other")
    identity = json.loads((other / "identity.json").read_text())
    identity["base model"] = "0" * 64
    (other / "identity.json").write_text(json.dumps(identity))
    return folder


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
