"""Sweeps: what they come to, who trains what, and bad input. Trainers are fakes here
but in the last part, which trains for real."""

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
from commands import ROOT, chain
from doors import run_door
from waiting import PATIENCE, wait_until

import launch.sweep
from launch.jobs import compiler_settings
from launch.jobs.launch_job import LaunchPlan
from launch.report import sweep_results
from launch.sweep import __main__ as sweep_door
from launch.sweep import run_packs, sweep_runs, sweep_spec, sweep_worker
from launch.sweep.sweep_spec import Sweep, choice, grid, listed, log, sampled
from launch.sweep.sweep_worker import SweepWorker
from launch.targets.local import ProcessGroup
from research.core.errors import DivergedError, UserError

# ml_collections loads a config file the old way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

CONFIG = str(ROOT / "configs" / "finetune_dolly.py")
RANKS = grid("lora.rank", 4, 8)
SHIPPED = [
    file
    for file in sorted((ROOT / "configs" / "sweeps").glob("*.py"))
    if file.stem not in ("__init__", "small")
]


def make(*axes, **more):
    return Sweep(
        **{"config": CONFIG, "axes": axes or (RANKS,), "seeds": (0, 1), **more}
    )


def expand(sweep, *overrides, folder="sweep"):
    return sweep_runs.expand(sweep, Path(folder), overrides)


# A sweep file becomes a list of runs.


def test_axes_are_crossed_and_every_point_has_every_seed():
    rates = grid("optim.learning_rate", 1e-3, 2e-4)
    found = expand(make(RANKS, rates))
    seen = {
        (x.config.lora.rank, x.config.optim.learning_rate, x.config.seed) for x in found
    }
    assert seen == set(itertools.product((4, 8), (1e-3, 2e-4), (0, 1)))
    assert len({x.config.run_dir for x in found}) == len(found) == 8


def test_the_command_of_a_run_makes_its_config():
    """The trainer's own parser accepts the flags that the report prints."""
    from launch.jobs.launch_job import check_training_flags

    tuples = listed("on", all={}, one={"lora.targets": ("mlp", "query")})
    for run in expand(make(tuples, changes={"steps": 7}), "--config.eval.every=3"):
        assert check_training_flags(run.flags) == run.config
        assert run.config.steps == 7 and run.config.eval.every == 3


def test_the_command_line_takes_back_what_the_sweep_changes():
    (run, *_) = expand(make(changes={"steps": 7}), "--config.steps=9")
    assert run.config.steps == 9
    assert not any(x.startswith("--config.steps=7") for x in run.flags)


def test_a_shared_knob_acts_in_the_runs_that_have_a_use_for_it():
    """The trainer refuses a knob without effect; a sweep has runs of several kinds."""
    from launch.jobs.launch_job import check_training_flags

    kinds = listed("trained", lora={}, full={"trainable": "full"})
    lora, full = expand(make(kinds, seeds=(0,)), "--config.lora.rank=8")
    assert lora.config.lora.rank == 8 and full.config.lora.rank == 16
    for run in (lora, full):
        assert check_training_flags(run.flags) == run.config
    rates = {f"{x}": {"trainable": "full", "optim.learning_rate": x} for x in (1e-4, 1)}
    alone = listed("trained", **rates)
    with pytest.raises(UserError, match=r"the sweep: config.lora.rank is 8.*no effect"):
        expand(make(alone, seeds=(0,)), "--config.lora.rank=8")
    both = listed("trained", lora={}, full={"trainable": "full", "lora.rank": 4})
    with pytest.raises(UserError, match=r"trained-full.*lora.rank is 4.*no effect"):
        expand(make(both, seeds=(0,)))


def test_epochs_take_the_place_of_steps_wherever_they_are_varied():
    """The file of the sweep gives steps, and the trainer would refuse both."""
    from launch.jobs.launch_job import check_training_flags

    found = expand(make(grid("epochs", 1.0, 2.5), changes={"steps": 7}))
    found += expand(
        make(changes={"steps": 7}), "--config.epochs=2", "--config.steps=-1"
    )
    for run in found:
        assert check_training_flags(run.flags) == run.config
        assert run.config.steps == -1 and run.config.epochs in (1.0, 2.0, 2.5)
    assert sweep_worker.total_steps(found[0]) == 0  # Its data was never counted.


def test_axes_on_the_command_line_make_the_sweep_of_a_file():
    written = ["lora.rank=4, 16", "lora.targets=attention,attention+mlp"]
    sweep, rest = sweep_spec.of_axes(written, [f"--config={CONFIG}", *REST])
    assert (sweep.config, rest) == (CONFIG, REST)
    rank, targets = sweep.axes
    assert rank == grid("lora.rank", 4, 16)
    assert targets == grid("lora.targets", ("attention",), ("attention", "mlp"))
    runs = expand(sweep, *rest)
    assert len(runs) == 12 and runs[-1].config.lora.targets == ("attention", "mlp")
    assert runs[0].config.steps == 3


REST = ["--config.steps=3"]


@pytest.mark.parametrize(
    "axis, more, said",
    [
        ("lora.rnak=1,2", (), "did you mean 'lora.rank'"),
        ("lora.rank=1,b", (), "'b' is no int"),
        ("export=yes,no", (), "'yes' is no bool"),
        ("lora.rank=4,4", (), "give each once"),
        ("lora.rank=4,8", ("--config=b.py",), "there are 2"),
    ],
)
def test_an_axis_that_makes_no_sense_is_refused(axis, more, said):
    with pytest.raises(UserError, match=said):
        sweep_spec.of_axes([axis], [f"--config={CONFIG}", *more])


def test_seeds_whose_epochs_may_be_of_other_lengths_train_apart():
    found = expand(make(changes={"epochs": 2.0}, seeds=(0, 1, 2)))
    packs = run_packs.make_packs(found, 8, Path("sweep"))
    assert [len({run.config.seed for run in pack.runs}) for pack in packs] == [1] * 3
    assert sum(len(pack.runs) for pack in packs) == len(found)


def test_random_points_are_the_same_every_time():
    def draw(seed):
        return sampled(
            "trial",
            5,
            seed,
            optim__learning_rate=log(1e-5, 1e-2),
            lora__rank=choice(4, 8),
        )

    assert draw(1) == draw(1) != draw(2)
    rates = [x["optim.learning_rate"] for x in draw(1).points.values()]
    assert all(1e-5 <= x <= 1e-2 for x in rates) and len(set(rates)) == 5


@pytest.mark.parametrize("file", SHIPPED, ids=lambda f: f.stem)
def test_shipped_sweeps_expand(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = expand(sweep_spec.load(str(file)))
    assert len(found) >= 6 and len(sweep_spec.load(str(file)).question) > 20


# Which runs share a program.


def test_the_documented_sweep_uses_every_function_and_expands(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "sweeps.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_sweep.py").write_text(code)
    monkeypatch.chdir(ROOT)
    sweep = sweep_spec.load(str(tmp_path / "my_sweep.py"))
    runs = expand(sweep)
    assert len(runs) == 12 * 3 and "2 x 2 x 3 points" in text
    assert sweep.question.startswith("Do more directions help")
    for name in set(vars(launch.sweep)) - {"sweep_spec"}:
        if not name.startswith("_") and callable(getattr(launch.sweep, name)):
            assert f"{name}(" in code and f"`{name}" in text, name
    for field in dataclasses.fields(Sweep):
        assert f"| `{field.name}` |" in text


def test_runs_share_a_program_where_they_can():
    trained = listed("trained", lora={}, full={"trainable": "full"})
    found = expand(make(grid("optim.learning_rate", 1e-4, 1e-3), trained))
    packed = run_packs.make_packs(found, 8, Path("sweep"))
    sizes = sorted(len(pack.runs) for pack in packed)
    assert sizes == [1, 1, 1, 1, 4]
    assert sorted(r.name for u in packed for r in u.runs) == sorted(
        r.name for r in found
    )


def test_programs_are_of_equal_size():
    found = expand(make(grid("lora.rank", 2, 4, 8), seeds=(0, 1, 2)))
    assert [len(u.runs) for u in run_packs.make_packs(found, 8, Path("s"))] == [5, 4]
    assert all(len(u.runs) == 1 for u in run_packs.make_packs(found, 1, Path("s")))


def test_a_program_of_several_is_given_every_run_whole():
    """The trainer's own reader makes the runs' configs out of the flag."""
    from launch.jobs.launch_job import check_training_flags
    from research.train.together.__main__ import read_runs

    found = expand(make(changes={"steps": 7}))
    (pack,) = run_packs.make_packs(found, 8, Path("sweep"))
    *shared, given = pack.job.flags
    read = read_runs(given.removeprefix("--runs="), check_training_flags(shared))
    assert read == [run.config for run in found]


# Who trains what. A fake trainer notes that it began, and ends as it is told.

TRAINER = """
import json, os, sys, time
time.sleep(float(sys.argv[1]))
code = int(sys.argv[2])
for folder in sys.argv[3:]:
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(os.path.dirname(folder), "trained"), "a") as out:
        out.write(os.path.basename(folder) + "\\n")
    if code == 2:
        print("error: no such rows\\n  name others")
    if not code:
        # Whole at once, as the real trainer writes it: the other workers read it.
        with open(os.path.join(folder, "unfinished"), "w") as out:
            out.write("{}")
        os.replace(out.name, os.path.join(folder, "complete.json"))
sys.exit(code)
"""
PATHS = [str(ROOT / "tests" / name) for name in ("launch", "support")]
WORK = """
import sys
from pathlib import Path
sys.path[:0] = {tests!r}
import test_sweep
sys.exit(test_sweep.work(Path({folder!r}), {most}, {code}))
"""


def work(folder, most=1, code=0, seconds=0.05, check=lambda: None):
    """One worker, to its end; returns its exit code."""
    found = expand(make(seeds=(0, 1, 2)), folder=str(folder))
    made = run_packs.make_packs(found, most, folder)
    codes = [code, *[0] * len(made)]
    plans = []
    for code, pack in zip(codes, made, strict=False):
        folders = [str(run.folder) for run in pack.runs]
        command = [sys.executable, "-c", TRAINER, str(seconds), str(code), *folders]
        plans.append(LaunchPlan({}, [command]))
    with mock.patch.object(sweep_worker, "POLL", 0.2), ProcessGroup() as group:
        worker = SweepWorker(made, found, folder, group, check)
        return worker.work(plans, restarts=1)


def trained(folder):
    return sorted((folder / "trained").read_text().split())


def test_every_run_is_trained_once_by_many_workers(tmp_path):
    """Some of the workers put several runs into one program."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORK.format(tests=PATHS,
             folder=str(tmp_path), most=most, code=0)],
            cwd=ROOT,
        )
        for most in (1, 2, 6)
    ]  # fmt: skip
    assert [process.wait(2 * PATIENCE) for process in processes] == [0] * 3
    names = [run.name for run in expand(make(seeds=(0, 1, 2)))]
    assert set(trained(tmp_path)) == set(names)
    assert len(trained(tmp_path)) == len(names) == 6


def test_what_is_done_is_not_trained_again(tmp_path):
    assert work(tmp_path) == work(tmp_path) == 0
    assert len(trained(tmp_path)) == 6


def test_a_failed_run_is_tried_again_and_told_and_stops_no_other(tmp_path):
    """A crash is worth one restart here, a divergence none; a new start tries both."""
    assert work(tmp_path, code=1) == 1
    assert trained(tmp_path).count("rank-4_seed-0") == 2 and len(trained(tmp_path)) == 7
    assert work(tmp_path, code=DivergedError.exit_code) == DivergedError.exit_code
    assert len(trained(tmp_path)) == 8
    assert work(tmp_path) == 0
    assert len(trained(tmp_path)) == 9


def test_a_users_error_before_any_step_is_shown_and_starts_no_other(tmp_path, caplog):
    assert work(tmp_path, code=2) == 2
    assert trained(tmp_path) == ["rank-4_seed-0"]
    assert "failed with code 2; see" in caplog.text
    assert "\nerror: no such rows\n  name others" in caplog.text
    assert "no other run is started" in caplog.text
    sweep = make(seeds=(0, 1, 2))
    found = expand(sweep, folder=str(tmp_path))
    sweep_runs.write(tmp_path, sweep, "s.py", found)
    states = [x.state for row in sweep_results.load(tmp_path).rows for x in row.results]
    assert states[0] == "failed with code 2 error: no such rows name others"
    assert set(states[1:]) == {"not begun"}
    assert work(tmp_path) == 0 and len(trained(tmp_path)) == 7
    # A run is done, so the error is this run's own.
    (found[0].folder / "complete.json").unlink()
    (found[1].folder / "complete.json").unlink()
    assert work(tmp_path, code=2) == 2 and len(trained(tmp_path)) == 9


def test_a_sweep_that_cannot_be_judged_ends_after_its_first_run(tmp_path):
    sweep = make(seeds=(0, 1, 2))
    sweep_runs.write(tmp_path, sweep, "s.py", expand(sweep, folder=str(tmp_path)))
    with pytest.raises(
        UserError, match=r"has an evaluation; see config.data.held_out "
    ):
        work(tmp_path, check=lambda: sweep_results.load(tmp_path))
    assert trained(tmp_path) == ["rank-4_seed-0"]


def test_a_pack_is_given_up_only_where_all_that_is_left_of_it_has_failed(tmp_path):
    """Another worker's one failure takes the others of the pack with it no more."""
    found = expand(make(), folder=str(tmp_path))
    (pack,) = run_packs.make_packs(found, 8, tmp_path)
    with ProcessGroup() as group:
        worker = SweepWorker([pack], found, tmp_path, group)
        (tmp_path / "claims").mkdir()
        for run in found:
            assert not worker._failed(pack), run.name
            (tmp_path / "claims" / f"{run.name}.failed").write_text("3")
        assert worker._failed(pack)
        assert worker.failures == {run.name: 3 for run in found}


def test_a_dead_worker_holds_nothing_and_its_trainer_what_it_trains(tmp_path):
    """The trainer outlives it; the next worker waits for that run, and no longer."""
    slow = WORK.format(tests=PATHS, folder=str(tmp_path), most=1, code=0)
    slow = slow.replace(", 0))", ", 0, 1.5))")
    dead = subprocess.Popen([sys.executable, "-c", slow], cwd=ROOT)
    log = tmp_path / "logs" / "rank-4_seed-0.log"
    wait_until(lambda: log.exists() or dead.poll() is not None)
    dead.kill()
    dead.wait()
    assert work(tmp_path) == 0
    assert len(trained(tmp_path)) == 6


# Bad input.


def same_label():
    return listed("a", **{"x y": {"lora.rank": 4}, "x/y": {"lora.rank": 8}})


BAD = {
    "no knob": (lambda: make(grid("lora.rnak", 1, 2)), "'lora.rank'"),
    "one value": (lambda: make(grid("lora.rank", 4)), "nothing to compare"),
    "a value twice": (lambda: make(grid("lora.rank", 4, 4)), "give each once"),
    "clashing names": (lambda: make(same_label()), "two runs are called"),
    "a knob on two axes": (
        lambda: make(RANKS, listed("b", a={"lora.rank": 1}, b={})),
        "both vary 'lora.rank'",
    ),
    "seed as an axis": (lambda: make(grid("seed", 1, 2)), "use seeds="),
    "a seed twice": (lambda: make(seeds=(1, 1)), "give each once"),
    "no axis": (lambda: make(axes=()), "name one or more"),
    "wrong type": (lambda: make(grid("lora.rank", 4, "many")), "lora.rank is 'many'"),
    "unknown baseline": (
        lambda: make(baseline={"lora.rank": "5"}),
        "the axis has 4, 8",
    ),
    "unknown metric": (lambda: make(metric="los"), "'loss'"),
    "change of no knob": (lambda: make(changes={"stpes": 3}), "'steps'"),
    "no held-out rows": (
        lambda: make(grid("data.held_out", 4, 0)),
        "run held-out-0_seed-0 of the sweep holds out no rows, and its metric, 'loss'",
    ),
}


@pytest.mark.parametrize("sweep, said", BAD.values(), ids=list(BAD))
def test_a_wrong_sweep_is_refused(sweep, said):
    with pytest.raises(UserError, match=re.escape(said)):
        expand(sweep())


SWEEP = f"""
from launch.sweep.sweep_spec import Sweep, grid
def get_sweep():
    return Sweep(config={CONFIG!r}, axes=[grid({{knob!r}}, 4, 8)])
"""
BAD_COMMANDS = {
    "unknown target": (("--target=locl",), "lora.rank", "'local'"),
    "two sweeps": (("--sweep=absent.py",), "lora.rank", "given several times"),
    "mistyped flag": (("--togehter=3",), "lora.rank", "--togehter"),
    "mistyped knob": (("--", "--config.stpes=3"), "lora.rank", "'steps'"),
    "axis of no knob": ((), "lora.rnak", "'lora.rank'"),
    "an axis overridden": (("--", "--config.lora.rank=3"), "lora.rank", "is an axis"),
    "no seeds": (("--seeds=a",), "lora.rank", "0,1,2"),
    "missing tool": (("--target=slurm",), "lora.rank", "slurm-client"),
}


@pytest.mark.parametrize("flags, knob, said", BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_bad_input_is_one_line_and_nothing_is_made(
    tmp_path, monkeypatch, flags, knob, said
):
    (tmp_path / "s.py").write_text(SWEEP.format(knob=knob))
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run_door(sweep_door.main, tmp_path, "launch.sweep", "--sweep=s.py", *flags)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert [x.name for x in tmp_path.iterdir() if x.name != "__pycache__"] == ["s.py"]


def test_a_folder_of_another_sweep_is_refused(tmp_path):
    sweep = make()
    folder = tmp_path / "sweep"
    sweep_runs.write(folder, sweep, "s.py", expand(sweep, folder=folder))
    for more in (make(seeds=(7,)), make(grid("lora.rank", 4, 8, 16))):
        sweep_runs.check_folder(folder, more, expand(more, folder=folder))


def named(label, rank):
    return listed("lora.rank", **{"4": {"lora.rank": 4}, label: {"lora.rank": rank}})


OTHERS = {
    # None of their runs has a name that is known: only what is shared tells.
    "steps": (make(seeds=(7,), changes={"steps": 3}), "whose runs share --config="),
    "a label": (make(named("8", 9), seeds=(7,)), r"lora\.rank=8 is .*8"),
    "axes": (make(grid("optim.learning_rate", 1e-3, 1e-4)), "over lora.rank"),
}


@pytest.mark.parametrize("other, said", OTHERS.values(), ids=OTHERS)
def test_runs_that_cannot_be_compared_do_not_share_a_folder(tmp_path, other, said):
    sweep = make()
    sweep_runs.write(tmp_path, sweep, "s.py", expand(sweep, folder=tmp_path))
    before = (tmp_path / "sweep.json").read_bytes()
    for refuse in (
        lambda: sweep_runs.check_folder(
            tmp_path, other, expand(other, folder=tmp_path)
        ),
        lambda: sweep_runs.write(
            tmp_path, other, "s.py", expand(other, folder=tmp_path)
        ),
    ):
        with pytest.raises(UserError, match=f"holds a sweep .*{said}"):
            refuse()
    assert (tmp_path / "sweep.json").read_bytes() == before


def test_settings_reach_the_trainers_of_this_machine(tmp_path, monkeypatch):
    """And a name that is none is refused, before anything is made."""
    monkeypatch.chdir(tmp_path)
    Path("s.py").write_text(SWEEP.format(knob="lora.rank"))
    given = []
    monkeypatch.setattr(
        sweep_door, "train", lambda wanted, plans, *_: given.extend(plans) or 0
    )
    command = ["launch.sweep", "--sweep=s.py"]
    with pytest.raises(UserError, match="typo"):
        sweep_door.main([*command, "--settings=typo"])
    assert not Path("runs").exists()
    setting, *_ = [x for x in compiler_settings.SETTINGS if x.startswith("gpu-")]
    assert sweep_door.main([*command, f"--settings={setting}"]) == 0
    assert given and all(env for plan in given for env in plan.env)


def test_the_list_keeps_what_others_have_put_there(tmp_path):
    """Another worker's seeds stay, and a point that is no more goes."""
    for ranks, seeds in (((4, 8, 16), (0,)), ((4, 8), (1, 2))):
        sweep = make(grid("lora.rank", *ranks), seeds=seeds)
        sweep_runs.write(tmp_path, sweep, "s.py", expand(sweep, folder=tmp_path))
    listed = sweep_runs.read(tmp_path)
    assert {(x["point"][0], x["seed"]) for x in listed["runs"]} == {
        (rank, seed) for rank in ("4", "8") for seed in (0, 1, 2)
    }
    assert listed["seeds"] == [0, 1, 2]
    assert [x.name for x in tmp_path.glob("*.json")] == ["sweep.json"]


def test_a_sweep_goes_to_a_cluster_as_one_array(tmp_path, fake, monkeypatch):
    """Named as the sweep is; listed for the report even if it was not taken."""
    fake("sbatch")
    monkeypatch.chdir(tmp_path)
    Path("s.py").write_text(SWEEP.format(knob="lora.rank"))
    command = ["launch.sweep", "--sweep=s.py", "--target=slurm"]
    assert sweep_door.main([*command, "--dry-run"]) == 0
    assert not Path("runs").exists() and not fake.calls()
    fake.answer("sbatch", "--requeue", code=1)
    assert sweep_door.main(command) == 1
    (call,) = fake.calls()
    assert {"--job-name=s", "--array=0-5"} <= set(call)
    assert any(x.startswith("--output=") and x.endswith(".%A.%a.log") for x in call)
    assert len(sweep_runs.read(Path("runs/sweeps/s"))["runs"]) == 6
    (tmp_path / "runs/sweeps/s/rank-4_seed-0").mkdir()
    (tmp_path / "runs/sweeps/s/rank-4_seed-0/complete.json").write_text("{}")
    assert sweep_door.main(command) == 1
    assert "--array=0-4" in fake.calls()[1], "what is done was sent again"


def test_a_terminal_that_is_gone_stops_what_was_started():
    before = signal.getsignal(signal.SIGHUP)
    with ProcessGroup() as group:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGHUP)).start()
        plan = LaunchPlan({}, [[sys.executable, "-c", "import time; time.sleep(1000)"]])
        assert group.train(plan, restarts=3) == -signal.SIGTERM
    assert signal.getsignal(signal.SIGHUP) == before


def test_a_signal_before_a_start_reaches_what_is_started(tmp_path):
    with ProcessGroup() as group:
        group.last_signal = signal.SIGTERM
        plan = LaunchPlan({}, [[sys.executable, "-c", "import time; time.sleep(1000)"]])
        assert group.train(plan, restarts=3) == -signal.SIGTERM


# For real: two ranks as one program, and a run that diverges.

REAL = """
'''Is this question in the report?'''
from launch.sweep.sweep_spec import Sweep, listed
def get_sweep():
    bad = {"trainable": "full", "lora.rank": 16, "lora.dropout": 0.0}
    bad |= {"optim.learning_rate": 1e30, "optim.clip_norm": 0.0}
    ranks = {str(r): {"lora.rank": r} for r in (2, 4)}
    return Sweep(
        config="config.py", axes=[listed("kind", **ranks, bad=bad)], seeds=(0,),
        changes={"eval.prompts": 1, "data.held_out": 16},
    )
"""


@chain
def swept(place, results):
    """A sweep, and the same again."""
    results("unbroken")
    (place.folder / "real.py").write_text(REAL)
    command = ("-m", "launch.sweep", "--sweep=real.py")
    return [place.start_python(*command).finish() for _ in range(2)]


@pytest.mark.parametrize(
    ("trained", "said"),
    [(20, "; about 1:40 to go for one worker"), (0, ""), (-12, "")],
    ids=["at a pace", "nothing yet", "behind the steps it had logged"],
)
def test_the_time_to_go_is_said_where_a_pace_is_known(trained, said):
    assert sweep_worker.time_to_go(50, trained, 40.0) == said


@pytest.mark.soak
def test_a_real_sweep_trains_all_it_can_and_says_what_failed(place, swept):
    first, again = swept
    folder = place.folder / "runs" / "sweeps" / "real"
    for done in (first, again):
        assert done.code == DivergedError.exit_code, done.err
        assert "kind-bad_seed-0 failed with code 3" in done.err
    assert "training real kind-2_seed-0 and 1 more" in first.err
    assert "training real kind-2" not in again.err
    assert "training real kind-bad" in again.err
    found = {
        x["name"]: x for x in json.loads((folder / "sweep.json").read_text())["runs"]
    }
    assert found.keys() == {"kind-2_seed-0", "kind-4_seed-0", "kind-bad_seed-0"}
    page = (folder / "report.md").read_text()
    assert "Is this question in the report?" in page and "2 of 3 runs are done" in page
    last = place.lines("sweeps/real/kind-4_seed-0", "eval")[-1]["loss"]
    assert f"{last:.4f}" in page and "1 of 1 runs not done" in page
    assert "best: kind=" in first.err and "nothing is known about noise" in first.err
