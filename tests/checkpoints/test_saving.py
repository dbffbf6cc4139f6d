"""Checkpoints are whole or known to be damaged."""

import dataclasses
import errno
import json
import random
import shutil

import jax.numpy as jnp
import optax
import pytest
from commands import ROOT
from free_ports import free_port
from helpers import in_soak
from jax.experimental import multihost_utils
from small_states import (
    FUTURES,
    IDENTITY,
    KEEP,
    LOSSES,
    POSITION,
    abstract,
    equal,
    flip_one,
    make_state,
    open_checkpoints,
    save_steps,
)

from research.checkpoints import checksums, orbax_manager
from research.checkpoints.checkpoint_listing import choose_step, inspect
from research.checkpoints.checkpointer import Checkpointer
from research.checkpoints.checksums import dealt, find_damage
from research.core.errors import DamagedError, SaveError, UserError

pytestmark = FUTURES


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1, 2 and 3, the first of them the best."""
    folder = tmp_path_factory.mktemp("saved")
    save_steps(folder, 1, 2, 3)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path


def files_of(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


def test_a_checkpoint_comes_back_byte_for_byte(saved):
    with open_checkpoints(saved, read_only=True) as checkpointer:
        found = checkpointer.restore(abstract(make_state(0)))
    assert found.step == 3 and found.position == POSITION
    assert equal(found.state, make_state(3))


def test_a_save_asks_nothing_of_the_preemption_service(tmp_path, monkeypatch):
    """It picks the moment to stop at by what it was asked last, see `stopping`."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    with Checkpointer(tmp_path, KEEP, IDENTITY) as checkpointer:
        checkpointer.save(1, make_state(1), POSITION, 2.5)
    assert (tmp_path / "1").is_dir() and asked == []


def test_every_file_is_under_a_seal(saved):
    folder = saved / "checkpoints" / "3"
    for file in files_of(folder):
        if file.stat().st_size:
            before = file.read_bytes()
            flip_one(file)
            assert find_damage(folder), f"{file} has changed and nobody saw it"
            file.write_bytes(before)
    assert find_damage(folder) == []


def damage(path, generator):
    """A flipped bit, a file cut short, or one that is gone; says which."""
    kind = generator.choice(["flip", "truncate", "delete"])
    data = bytearray(path.read_bytes())
    if kind == "delete" or not data:
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(data[: generator.randrange(len(data))])
    else:
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
    return f"{kind} of {path.name}"


@pytest.mark.parametrize("restarts", [4, in_soak(20)])
def test_none_of_200_damages_is_restored_silently(saved, restarts):
    """Each is seen; without the seals most flips in arrays are not."""
    folder, generator = saved / "checkpoints" / "3", random.Random(0)
    wanted = abstract(make_state(0))
    files = files_of(folder)
    with open_checkpoints(saved, read_only=True) as checkpointer:
        for number in range(200):
            path = generator.choice(files)
            before = path.read_bytes()
            what = damage(path, generator)
            with pytest.raises(DamagedError):
                checkpointer.restore(wanted, 3)
                raise AssertionError(f"{what} went unnoticed")
            if number % (200 // restarts) == 0:  # The next start, which finds it.
                said = []
                with open_checkpoints(saved, report=said.append) as started:
                    assert started.restore(wanted).step == 2, what
                (aside,) = (saved / "damaged").iterdir()
                assert "checkpoint 3 is damaged" in said[0] and aside.name[0] == "3"
                aside.rename(folder)
                (saved / "damaged").rmdir()
            path.write_bytes(before)
        assert checkpointer.restore(wanted, 3).step == 3


def test_each_process_reads_its_share_and_together_all(saved, monkeypatch):
    read = []
    checksum = checksums.checksum
    monkeypatch.setattr(
        checksums, "checksum", lambda path: read.append(path) or checksum(path)
    )
    folder = saved / "checkpoints" / "3"
    shares = []
    for index in range(4):
        read.clear()
        assert find_damage(folder, index, 4) == []
        shares.append(set(read))
    everything = set(files_of(folder)) - {folder / "sums.json"}
    assert set.union(*shares) == everything
    assert sum(map(len, shares)) == len(everything)


def test_a_damaged_newest_step_is_set_aside_and_the_next_one_used(copy):
    flip_one(next((copy / "checkpoints/3/state/ocdbt.process_0/d").iterdir()))
    said, before = [], len(files_of(copy / "checkpoints/3"))
    with open_checkpoints(copy, report=said.append) as checkpointer:
        found = checkpointer.restore(abstract(make_state(0)))
        assert checkpointer.steps == [1, 2]
    assert found.step == 2 and equal(found.state, make_state(2))
    (line,) = said
    assert "checkpoint 3 is damaged" in line and "bytes have changed" in line
    (aside,) = (copy / "damaged").iterdir()
    assert aside.name.startswith("3-") and str(aside) in line
    assert len(files_of(aside)) == before


def save_ruined(folder, step):
    state = make_state(step)
    state["moment"]["w"] = state["moment"]["w"].at[5].set(jnp.inf)
    with open_checkpoints(folder) as checkpointer:
        checkpointer.save(step, state, POSITION, None)


def test_a_newest_step_that_is_not_finite_is_set_aside(copy):
    """Its files are intact: an older version of this program wrote it."""
    save_ruined(copy, 4)
    said = []
    with open_checkpoints(copy, report=said.append) as checkpointer:
        with pytest.raises(DamagedError, match=r"moment\.w holds .* not finite"):
            checkpointer.restore(abstract(make_state(0)), 4)
        found = checkpointer.restore(abstract(make_state(0)))
        assert checkpointer.steps == [2, 3]
    assert found.step == 3 and equal(found.state, make_state(3))
    (line,) = said
    assert "checkpoint 4 is damaged" in line and "moment.w holds a number" in line


def test_parameters_that_are_not_finite_are_not_opened(copy):
    save_ruined(copy, 4)
    wanted = abstract(make_state(0))
    with open_checkpoints(copy, read_only=True) as checkpointer:
        with pytest.raises(DamagedError, match=r"checkpoint 4 .*not finite"):
            checkpointer.restore_part(4, {"moment": wanted["moment"]})
        found = checkpointer.restore_part(4, {"params": wanted["params"]})
    assert equal(found["params"], make_state(4)["params"])


def test_a_checkpoint_that_is_read_in_parts_is_named_once_with_its_run(copy, caplog):
    wanted = abstract(make_state(0))
    caplog.set_level("INFO")
    with open_checkpoints(copy, read_only=True) as checkpointer:
        for check in (True, False, False):
            checkpointer.restore_part(3, {"params": wanted["params"]}, check=check)
    (said,) = (x for x in caplog.messages if " restored" in x)
    assert said == f"checkpoint: step 3 restored from {copy}"


def test_moments_that_were_saved_in_bfloat16_are_read_in_float32(tmp_path):
    """Older versions kept them in the dtype of the parameters."""
    state = make_state(1)
    old = {**state, "moment": {"w": state["moment"]["w"].astype(jnp.bfloat16)}}
    with open_checkpoints(tmp_path) as checkpointer:
        checkpointer.save(1, old, POSITION, None)
        checkpointer.wait()
        found = checkpointer.restore(abstract(state)).state
    assert found["moment"]["w"].dtype == jnp.float32
    old["moment"]["w"] = old["moment"]["w"].astype(jnp.float32)
    assert equal(found, old)


def test_losses_on_other_data_are_not_compared(copy):
    """After `accept=data` the losses before it say nothing of the new held-out rows."""
    other = {**IDENTITY, "data": "e"}
    keep = dataclasses.replace(KEEP, keep_last=1, keep_best=1)
    with Checkpointer(copy / "checkpoints", keep, other, accept=["data"]) as opened:
        assert opened.best_step is None
        opened.save(4, make_state(4), POSITION, 7.0)
        assert not opened.is_among_best(5, 7.5) and opened.is_among_best(5, 6.5)
        opened.save(5, make_state(5), POSITION, 7.5)
        opened.wait()
        assert opened.steps == [4, 5] and opened.best_step == 4
    listed = inspect(copy / "checkpoints")
    assert [(x.step, x.loss, x.data) for x in listed] == [(4, 7.0, "e"), (5, 7.5, "e")]


def test_steps_are_ranked_by_a_metric_of_their_answers(tmp_path):
    """Its cost is the lower the better; a loss, or another metric, ranks nothing."""
    keep = dataclasses.replace(KEEP, keep_last=1, keep_best=1, best_by="rouge_l")
    folder = tmp_path / "checkpoints"
    with Checkpointer(folder, keep, IDENTITY) as opened:
        for step, loss, cost in ((1, 1.0, None), (2, 9.0, -0.5), (3, None, -0.1)):
            opened.save(step, make_state(step), POSITION, loss, cost)
        opened.wait()
        assert opened.steps == [2, 3] and opened.best_step == 2
        assert not opened.is_among_best(4, -0.4) and opened.is_among_best(4, -0.6)
    with Checkpointer(folder, keep, IDENTITY) as opened:
        assert not opened.is_among_best(4, -0.4) and opened.is_among_best(4, -0.6)
    with Checkpointer(
        folder, dataclasses.replace(keep, best_by="bleu"), IDENTITY
    ) as opened:
        assert opened.best_step is None and opened.is_among_best(4, 0.0)
    listed = inspect(folder, best_by="rouge_l")
    assert [(x.loss, x.cost) for x in listed] == [(9.0, -0.5), (None, -0.1)]
    assert choose_step(folder, "best", IDENTITY["data"], "", "rouge_l") == 2
    assert choose_step(folder, "best", IDENTITY["data"], "") == 2  # The only loss.
    with pytest.raises(UserError, match="no chrf was measured"):
        choose_step(folder, "best", IDENTITY["data"], "", "chrf")


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:5]),
    "empty": lambda path: path.write_bytes(b""),
    "no text": lambda path: path.write_bytes(b"\xff\xfe{"),
    "another digit": lambda path: path.write_text(path.read_text().replace("2", "3")),
    "another key": lambda path: path.write_text('{"lass": 2.5}'),
    "gone": lambda path: path.unlink(),
    "gone with its folder": lambda path: shutil.rmtree(path.parent),
}


@pytest.mark.parametrize(
    "how, step",
    [(how, 3) for how in DAMAGES]
    + [(how, 1) if how == "truncated" else in_soak(how, 1) for how in DAMAGES],
)
def test_a_step_with_damaged_metrics_is_set_aside(copy, how, step):
    """Orbax reads those of all steps when it opens; it fails in them, or believes."""
    DAMAGES[how](copy / f"checkpoints/{step}/metrics/metrics")
    others = [x for x in LOSSES if x != step]
    # Who only reads moves nothing, and judges by what is whole.
    with open_checkpoints(copy, read_only=True) as reader:
        assert reader.steps == [1, 2, 3] and reader.best_step == min(others)
        with pytest.raises(DamagedError, match=f"checkpoint {step}"):
            reader.restore(abstract(make_state(0)), step)
    assert not (copy / "damaged").exists()
    said = []
    with open_checkpoints(copy, report=said.append) as checkpointer:
        assert checkpointer.steps == others and checkpointer.best_step == min(others)
        found = checkpointer.restore(abstract(make_state(0)))
        assert found.step == max(others) and equal(found.state, make_state(found.step))
        assert [checkpointer.damage(x) for x in others] == [[], []]
        checkpointer.save(4, make_state(4), POSITION, 2.0)
    (line,) = said
    assert f"checkpoint {step} is damaged and was moved" in line and "metrics" in line
    (aside,) = (copy / "damaged").iterdir()
    assert aside.name.startswith(f"{step}-")


TWO = """
import sys
import jax
address, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, 2, index)
import numpy as np
from pathlib import Path
from jax.experimental import multihost_utils
from commands import ROOT
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from small_states import IDENTITY, KEEP, abstract
from research.core.errors import DamagedError
from research.checkpoints.checkpointer import Checkpointer

split = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
values = np.arange(64, dtype=np.float32)
state = {"w": jax.make_array_from_callback((64,), split, lambda i: values[i])}
folder = Path(folder) / "checkpoints"

def reopen(*damaged):
    for step in damaged if index == 0 else ():
        (folder / str(step) / "metrics" / "metrics").write_bytes(b"")
    multihost_utils.sync_global_devices(f"damaged {damaged}")
    with Checkpointer(folder, KEEP, IDENTITY) as checkpointer:
        return checkpointer.restore(abstract(state)).step

with Checkpointer(folder, KEEP, IDENTITY) as checkpointer:
    for step in (1, 2, 3):
        checkpointer.save(step, state, {}, 2.5)
print("restored", reopen(1, 3))
try:
    reopen(2)
except DamagedError as error:
    print(error)
"""


@pytest.mark.soak
def test_two_processes_agree_on_what_is_set_aside(place, tmp_path):
    address = f"localhost:{free_port()}"
    more = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
    running = [
        place.start_python("-c", TWO, address, str(index), str(tmp_path), more=more)
        for index in range(2)
    ]
    for process in running:
        finished = process.finish()
        assert finished.code == 0, finished.err
        restored, refused = finished.out.splitlines()[-2:]
        assert restored == "restored 2" and "are damaged (steps 2," in refused
    aside = sorted(x.name[0] for x in (tmp_path / "damaged").iterdir())
    assert aside == ["1", "2", "3"]


def test_when_the_metrics_of_all_are_damaged_nothing_is_restored(copy):
    for step in LOSSES:
        DAMAGES["empty"](copy / f"checkpoints/{step}/metrics/metrics")
    with (
        open_checkpoints(copy, report=lambda what: None) as checkpointer,
        pytest.raises(DamagedError, match=r"all .* damaged \(steps 1, 2, 3"),
    ):
        checkpointer.restore(abstract(make_state(0)))


def test_a_checkpoint_without_the_right_to_read_it_is_not_set_aside(copy, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checksums, "checksum", refuse)
    before = sorted(x.name for x in (copy / "checkpoints").iterdir())
    with pytest.raises(UserError, match="give back the right to read"):
        open_checkpoints(copy)
    with (
        open_checkpoints(copy, read_only=True) as checkpointer,
        pytest.raises(PermissionError),
    ):
        checkpointer.restore(abstract(make_state(0)))
    assert sorted(x.name for x in (copy / "checkpoints").iterdir()) == before


def test_when_all_are_damaged_nothing_is_restored_or_overwritten(copy):
    for step in (1, 2, 3):
        (copy / f"checkpoints/{step}/sums.json").unlink()
    before = len(files_of(copy))
    with (
        open_checkpoints(copy, report=lambda what: None) as checkpointer,
        pytest.raises(DamagedError, match=r"all checkpoints .* damaged"),
    ):
        checkpointer.restore(abstract(make_state(0)))
    assert len(files_of(copy)) == before
    assert len(list((copy / "damaged").iterdir())) == 3


def test_a_reader_moves_nothing(copy):
    flip_one(copy / "checkpoints/3/meta/metadata")
    before = files_of(copy)
    with open_checkpoints(copy, read_only=True) as checkpointer:
        for step in (None, 3):
            with pytest.raises(DamagedError, match="checkpoint 3"):
                checkpointer.restore(abstract(make_state(0)), step)
        assert checkpointer.restore(abstract(make_state(0)), 1).step == 1
    assert files_of(copy) == before


@pytest.mark.parametrize("part", IDENTITY)
def test_another_identity_is_refused_or_accepted_by_name(saved, part):
    other = {**IDENTITY, part: "other"}
    folder = saved / "checkpoints"
    with (
        Checkpointer(folder, KEEP, other, read_only=True) as checkpointer,
        pytest.raises(UserError, match=f"{part}: . -> other"),
    ):
        checkpointer.restore(abstract(make_state(0)))
    options = {"read_only": True, "accept": [part]}
    with Checkpointer(folder, KEEP, other, **options) as checkpointer:
        assert checkpointer.restore(abstract(make_state(0))).step == 3


def test_other_shapes_are_the_users_error(saved):
    with (
        open_checkpoints(saved, read_only=True) as checkpointer,
        pytest.raises(UserError, match="other parameters"),
    ):
        checkpointer.restore(abstract(make_state(0, rows=128)))


OTHER_TREES = {
    "another optimizer": (
        optax.lion,
        4,
        r"other optimizer state .*opt_state.*config\.optim",
    ),
    "more moments": (optax.adam, 4, None),
    "another shape": (
        optax.adam,
        5,
        r"other parameters .*params\.w is \[4\], not \[5\].*shape",
    ),
}


@pytest.mark.parametrize("name", OTHER_TREES)
def test_a_restore_blames_what_differs(trees, name):
    optimizer, size, said = OTHER_TREES[name]
    wanted = tree_of(optimizer, size)
    with Checkpointer(trees, KEEP, IDENTITY, read_only=True) as checkpointer:
        if said is None:
            assert equal(checkpointer.restore(wanted).state, wanted)
            return
        with pytest.raises(UserError, match=said):
            checkpointer.restore(wanted)


def tree_of(optimizer, size):
    params = {"w": jnp.zeros(size)}
    return {"params": params, "opt_state": optimizer(1e-3).init(params)}


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees")
    with Checkpointer(folder, KEEP, IDENTITY) as checkpointer:
        checkpointer.save(1, tree_of(optax.adam, 4), POSITION, 1.0)
    return folder


def test_a_checkpoint_without_a_seal_was_never_committed(copy):
    (copy / "checkpoints/3/sums.json").unlink()
    (problem,) = find_damage(copy / "checkpoints/3")
    assert problem.startswith("sums.json: No such file")


def test_a_forged_seal_does_not_match_itself(copy):
    file = copy / "checkpoints/3/sums.json"
    found = json.loads(file.read_text())
    next(iter(found["files"].values()))[0] += 1
    file.write_text(json.dumps(found))
    (problem,) = find_damage(copy / "checkpoints/3")
    assert "does not match its own sum" in problem


def swap(folder):
    (folder / "3").rename(folder / "x")
    (folder / "2").rename(folder / "3")
    (folder / "x").rename(folder / "2")


OTHER_PLACES = {
    "swapped": (swap, {"3": "holds step 2", "2": "holds step 3"}, 1),
    "renamed": (lambda x: (x / "3").rename(x / "4"), {"4": "holds step 3"}, 2),
    "copied": (
        lambda x: shutil.copytree(x / "3", x / "4"),
        {"4": "holds step 3, and its folder is named 4"},
        3,
    ),
}


@pytest.mark.parametrize("name", OTHER_PLACES)
def test_a_step_in_the_folder_of_another_is_damaged(copy, name):
    change, problems, left = OTHER_PLACES[name]
    change(copy / "checkpoints")
    for step, said in problems.items():
        (problem,) = find_damage(copy / "checkpoints" / step)
        assert said in problem
    with open_checkpoints(copy) as checkpointer:
        found = checkpointer.restore(abstract(make_state(0)))
        assert found.step == left and equal(found.state, make_state(left))
    moved = {path.name.partition("-")[0] for path in (copy / "damaged").iterdir()}
    assert moved == problems.keys()


def test_folders_that_no_save_names_so_are_no_steps(copy):
    for name in ("007", "\u0663", "\u00b2"):
        shutil.copytree(copy / "checkpoints/1", copy / "checkpoints" / name)
    assert [x.step for x in inspect(copy / "checkpoints")] == [1, 2, 3]
    with open_checkpoints(copy) as checkpointer:
        assert checkpointer.steps == [1, 2, 3]
    assert not (copy / "damaged").exists()


def test_checkpoints_that_are_removed_meanwhile_are_reported_once(copy):
    said = []
    with open_checkpoints(copy, report=said.append) as checkpointer:
        shutil.rmtree(copy / "checkpoints")
        for step in (4, 5, 6, 7, 8):  # Orbax removes the first of them.
            checkpointer.save(step, make_state(step), POSITION, None)
    assert said == [f"checkpoints were removed from {copy}/checkpoints: 1, 2, 3"]
    with open_checkpoints(copy) as checkpointer:
        assert checkpointer.steps == [6, 7, 8]


def test_a_checkpoint_of_another_run_is_damaged(tmp_path):
    """Same base, tokenizer and data; only the ids of the runs differ."""

    def open_run(name, **options):
        identity = IDENTITY | {"run": name}
        return Checkpointer(tmp_path / name / "checkpoints", KEEP, identity, **options)

    for name, step in (("a", 1), ("b", 2)):
        with open_run(name) as checkpointer:
            checkpointer.save(step, make_state(step), POSITION, LOSSES[step])
    steps = tmp_path / "a/checkpoints"
    shutil.copytree(tmp_path / "b/checkpoints/2", steps / "2")
    assert find_damage(steps / "2") == []  # Nobody says whose it should be.
    assert find_damage(steps / "2", run="a") == ["another run has saved it"]
    assert [bool(x.damage) for x in inspect(steps, "a")] == [False, True]
    with open_run("a", read_only=True) as checkpointer:
        assert checkpointer.best_step == 1
        with pytest.raises(DamagedError, match="another run"):
            checkpointer.restore(abstract(make_state(0)), step=2)
    with open_run("a") as checkpointer:
        assert checkpointer.restore(abstract(make_state(0))).step == 1
    # All are of one other run: it is identity.json that has changed.
    before = files_of(tmp_path / "b")
    other, said = IDENTITY | {"run": "c"}, r"b/identity\.json names run c, .*of run b;"
    for read_only in (False, True):
        with pytest.raises(UserError, match=said):
            Checkpointer(tmp_path / "b/checkpoints", KEEP, other, read_only=read_only)
    with pytest.raises(UserError, match=said):
        inspect(tmp_path / "b/checkpoints", "c")
    assert files_of(tmp_path / "b") == before
    # A run of an older version has no id: any of its checkpoints will do.
    with Checkpointer(
        tmp_path / "b/checkpoints", KEEP, IDENTITY, read_only=True
    ) as old:
        assert old.restore(abstract(make_state(0))).step == 2


def test_a_folder_may_have_any_name(tmp_path):
    """Orbax looks for files by patterns; a name is none."""
    odd = tmp_path / "lr[1e-4] *?{a}" / "50% $HOME ~, 'a' \"b\"" / "\u00e9\u4e2d\n"
    folder = odd / ("long" * 50) / "**"
    save_steps(folder, 1)
    assert (folder / "checkpoints/1/state/manifest.ocdbt").is_file()
    with open_checkpoints(folder, read_only=True) as checkpointer:
        found = checkpointer.restore(abstract(make_state(0)))
    assert equal(found.state, make_state(1))


def test_arrays_that_were_not_merged_are_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_manager, "_match_below", lambda folder, pattern: iter(()))
    with pytest.raises(SaveError, match=r"manifest\.ocdbt is missing"):
        save_steps(tmp_path, 1)
    assert not (tmp_path / "checkpoints/1").exists()


@pytest.mark.parametrize("folders", [0, 1, 4, 6])
@pytest.mark.parametrize("count", [1, 3, 4, 9, 13])
def test_each_part_of_a_folder_is_read_once_and_by_few(folders, count):
    """So seals are read as often as there are hosts, not as often as their square."""
    each = [list(dealt(folders, index, count)) for index in range(count)]
    assert max(map(len, each)) <= -(-folders // count)
    read = sorted(part for mine in each for part in mine)
    shares = {number: shares for number, shares, _ in read}
    assert [*shares] == list(range(folders))
    assert read == [(n, s, i) for n, s in shares.items() for i in range(s)]
