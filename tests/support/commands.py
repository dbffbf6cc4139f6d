"""The real commands in processes of their own, on a tiny model, and what they left.

Long commands run once, in the background, two processes at a time: see `chain`.
"""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny_model
from free_ports import free_port
from running import ForkServer, Running

ROOT = Path(__file__).parents[2]
# A test may have changed a variable when a chain in the background starts a process.
ENVIRONMENT = dict(os.environ)
STEPS, EVAL_EVERY, RANK = 16, 6, 4
EVALUATIONS = sorted({*range(0, STEPS, EVAL_EVERY), STEPS})

CONFIG = f"""
from research.config import defaults

def get_config():
    config = defaults()
    config.model.init_from = "model"
    config.model.dtype = "float32"
    config.steps = {STEPS}
    config.lora.rank = {RANK}
    config.lora.dropout = 0.1
    config.data.seq_len = 256
    config.data.overlength = "drop"
    config.data.batch_size = 8
    config.data.microbatch_size = 4
    config.data.held_out = 128
    config.data.edition = 1  # Recorded losses are of the rows that it trains.
    config.optim.learning_rate = 1e-2
    config.eval.every = {EVAL_EVERY}
    config.eval.max_new_tokens = 16
    config.eval.answers_rows = 1
    config.checkpoint.every = 5
    config.runtime.peak_tflops = 0.05
    return config
"""
# In the environment of the unbroken run; none of these values may get out.
SECRETS = {
    name: f"canary-{index}-of-the-environment"
    for index, name in enumerate(
        (
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "WANDB_API_KEY",
            "AWS_SECRET_ACCESS_KEY",
            "GOOGLE_API_KEY",
            "OPENAI_API_KEY",
        )
    )
}
# As many steps as the others make: another number is another program to compile.
FEW_ROWS = ("--config.eval.prompts=1", "--config.data.held_out=4")
QUESTION = "Are whales fish?"


class Place:
    """A folder with `model` and `config.py`, and commands that run in it.

    With `quick`, programs are compiled in half the time, see `conftest.py`, and run
    several times as long; and commands are forks of a process that has imported JAX,
    see `forking.py`. Commands say otherwise where it matters.
    """

    def __init__(self, folder, cache, quick, server=None):
        self.folder, self.cache, self.quick = folder, cache, quick
        self.server = server or ForkServer(self._environment(1, {}, quick))

    def beside(self, name):
        """Another folder of the same kind."""
        return Place(self.folder / name, self.cache, self.quick, self.server)

    def start(
        self, module, *flags, program="", quick=None, forked=None,
        devices=1, more=None,
    ):  # fmt: skip
        """A command of `research` that runs; `program` is Python that runs before."""
        if quick is None:
            # Many commands train by that config: they share what is compiled once.
            quick = module != "train" or "--config=config.py" not in flags
        if self.quick if forked is None else forked:
            return self.start_fork(
                program, module, *flags, quick=quick, devices=devices, more=more
            )
        name = f"research.{module}"
        run = f"import runpy\nrunpy.run_module({name!r}, {{}}, '__main__', True)"
        how = ["-c", f"{program}\n{run}"] if program else ["-m", name]
        return self.start_python(*how, *flags, quick=quick, devices=devices, more=more)

    def start_fork(self, program, module="", *flags, devices=1, more=None, quick=True):
        """Python in a process that has imported `research`, then a command."""
        return Running(
            self.server.start(
                folder=str(self.folder),
                env=self._environment(devices, more or {}, self.quick and quick),
                program=program,
                module=module,
                flags=flags,
            )
        )

    def start_launch(self, own, training, **options):
        """`python -m launch`, running."""
        return self.start_python("-m", "launch", *own, "--", *training, **options)

    def launch(self, own, training, **options):
        """`python -m launch`, to its end."""
        return self.start_launch(own, training, **options).finish()

    def start_python(self, *arguments, devices=1, more=None, quick=True):
        env = self._environment(devices, more or {}, self.quick and quick)
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, *arguments]
        return Running(subprocess.Popen(command, cwd=self.folder, env=env, **pipes))

    def _environment(self, devices, more, quick):
        settings = ("JAX_", "XLA_", "HF_", "PYTHON", "FORCE_COLOR", "TTY_")
        env = {k: v for k, v in ENVIRONMENT.items() if not k.startswith(settings)}
        return env | {
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(self.cache),
            "HF_HOME": str(self.cache),
            "HF_HUB_OFFLINE": "1",
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(quick)),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "COLUMNS": "160",
            **more,
        }

    def run(self, module, *flags, stdin="", **options):
        return self.start(module, *flags, **options).finish(stdin)

    def start_together(self, count, *flags, devices=2, programs=None):
        """Trains in `count` processes that find each other; returns them, running."""
        address = f"localhost:{free_port()}"
        return [
            self.start(
                "train",
                *flags,
                "--config.runtime.distributed=True",
                f"--config.runtime.coordinator_address={address}",
                f"--config.runtime.num_processes={count}",
                f"--config.runtime.process_id={index}",
                devices=devices,
                program=(programs or {}).get(index, ""),
            )
            for index in range(count)
        ]

    def run_short(self, commands, more=None):
        """Short commands one after another, as forks.

        Args:
          commands: (place, module, flags, devices) by name.
          more: variables of the environment of all of them.

        Returns:
          How each of them has ended, by name.
        """
        return {
            name: place.run(module, *flags, devices=devices, more=more, forked=True)
            for name, (place, module, flags, devices) in commands.items()
        }

    def train(self, run, *flags, **options):
        return self.run("train", *self.train_flags(run), *flags, **options)

    def generate(self, run, *flags, **options):
        limit = "--max_new_tokens=16"
        return self.run("generate", f"--run=runs/{run}", limit, *flags, **options)

    def train_flags(self, run):
        return "--config=config.py", f"--config.run_dir=runs/{run}"

    def stop(self, run, said, number, *flags, devices=1):
        """Trains and sends signal `number` at the first line that matches `said`."""
        every = (*self.train_flags(run), *flags)
        return self.stop_at(every, said, number, devices=devices)

    def stop_at(self, flags, said, number, *, devices=1):
        """As `stop`, with all of the flags."""
        process = self.start("train", *flags, devices=devices)
        process.wait_for(said)
        process.send(number)
        return process.finish()

    def run_dir(self, run):
        return self.folder / "runs" / run

    def lines(self, run, kind):
        text = (self.run_dir(run) / "metrics.jsonl").read_text()
        return [x for x in map(json.loads, text.splitlines()) if x["kind"] == kind]

    def saved_steps(self, run):
        folder = self.run_dir(run) / "checkpoints"
        return sorted(int(x.name) for x in folder.iterdir() if x.name.isdigit())


def step_line(step):
    return rf"step +{step}/{STEPS} "


def snapshot(folder, *besides):
    """Every file with its bytes; None where there is no such folder.

    Whose turn it was to write is no part of what a run holds; no more are `besides`.
    """
    files = [
        f
        for f in folder.rglob("*")
        if f.is_file() and f.stem != "lock" and f.name not in besides
    ]
    known = {file: file.read_bytes() for file in files}
    return known if folder.exists() else None


# The commands that run in the background, by the fixture that wants them.
CHAINS = {}
LONGEST = "story"  # It begins first, or it would run alone at the end.


def chain(function):
    """A fixture `function(place, results)` that runs in the background.

    All that the chosen tests ask for start with the first of them; `results(name)`
    waits for another one, which must be registered before.
    """
    name = function.__name__
    CHAINS[name] = {name: function}

    @pytest.fixture(scope="session", name=name)
    def fixture(results):
        return results(name)

    return fixture


def chains(name, functions):
    """A fixture that gives `results` for many functions by their names."""
    CHAINS[name] = functions

    @pytest.fixture(scope="session", name=name)
    def fixture(results):
        return results

    return fixture


@pytest.fixture(scope="session")
def place(request, tmp_path_factory):
    """In `make soak` commands start and compile as they do for users."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model.make_tiny_model(folder / "model")
    (folder / "config.py").write_text(CONFIG)
    chosen = request.config.option.markexpr
    quick = "soak" not in chosen.replace("not soak", "")
    made = Place(folder, tmp_path_factory.mktemp("cache"), quick)
    yield made
    made.server.close()


@pytest.fixture(scope="session")
def results(request, place):
    wanted = {name for item in request.session.items for name in item.fixturenames}
    known = {n: f for functions in CHAINS.values() for n, f in functions.items()}
    futures, lock = {}, threading.Lock()

    def result(name):
        with lock:
            if unasked := name not in futures:
                futures[name] = Future()
        if unasked:  # By a chosen test; another chain continues from it.
            try:
                futures[name].set_result(known[name](place, result))
            except Exception as error:
                futures[name].set_exception(error)
        return futures[name].result()

    pool = ThreadPoolExecutor(2)
    for fixture, functions in sorted(CHAINS.items(), key=lambda x: x[0] != LONGEST):
        for name, function in functions.items():
            if fixture in wanted:
                futures[name] = pool.submit(function, place, result)
    yield result
    pool.shutdown(cancel_futures=True)


@chain
def unbroken(place, results):
    # Others measure no answers in training, and have the same losses.
    answers = "--config.eval.answers_every=8", "--config.eval.answers_rows=3"
    own = "--config.runtime.peak_tflops=0", *answers
    return place.train("unbroken", *own, more=SECRETS, forked=False)


@pytest.fixture
def caches_of_the_commands(place, monkeypatch):
    """Rows that the commands have tokenised are there; compiled programs stay here."""
    from research.parallel import runtime

    monkeypatch.setenv("XDG_CACHE_HOME", str(place.cache))
    monkeypatch.setattr(runtime, "start_alone", lambda: None)
