"""The time until a streamed run trains again, far inside a large file.

    python tests/bench/stream_resume.py --gigabytes=4

Makes a .jsonl of the given size from the standard library's text. Prints for several
kinds of positions at 90 % of the text: the seconds until the first batch, and the
longest silence between two signs of life in them. Then trains a tiny model from there
until a signal, and resumes it with `runtime.watchdog_s=5`.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from research.config.run_config import Config, DataConfig, TextConfig
from research.data.source_shares.share_division import Deal, deal_shares
from research.data.text.text_sources import open_sources
from research.data.text.tokenized_corpus import load_text
from research.tokenize.tokenizer_training import byte_tokenizer

ROOT = Path(__file__).parents[2]
SHARE = 0.9
DRIVER = """
import json, os, runpy, signal, sys
from research.data.text.streaming import StreamedBatches
make, pull = StreamedBatches.__init__, StreamedBatches.__next__
left = [4]  # Batches: one for the doctor, then for training.
def begin_far(self, *given):
    make(self, *given)
    self.set_state(json.loads(position))
def stop_soon(self):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGTERM)
    return pull(self)
position = open(sys.argv.pop()).read()
StreamedBatches.__init__, StreamedBatches.__next__ = begin_far, stop_soon
runpy.run_module("research.train", run_name="__main__", alter_sys=True)
"""


def make_file(path: Path, size: int) -> None:
    """Rows of the standard library's text, each with its number; `size` in bytes."""
    (source,) = open_sources(TextConfig(), DataConfig())
    texts = [item.path.read_text(encoding="utf-8") for item in source.files]
    rows = [json.dumps({"text": text})[10:] for text in texts]
    with open(path, "w", encoding="utf-8") as file:
        written = 0
        for number, row in enumerate(itertools.cycle(rows)):
            if written >= size:
                return
            written += file.write(f'{{"text": "# {number} {row}\n')


def config_of(path: Path) -> Config:
    return Config(
        data=DataConfig(kind="text", seq_len=256),
        text=TextConfig(sources=(f"far={path}",), tokenizer="byte", cache=False),
    )


def far_position(path: Path, state: dict) -> dict:
    """`state` with each share at `SHARE` of its parts, at the start of a row."""
    (source,) = open_sources(config_of(path).text, config_of(path).data)
    places = []
    for parts in deal_shares(source, Deal(*state["deals"][0])):
        number = int(SHARE * len(parts))
        part = parts[number]
        end = source.files[0].size if part.end is None else part.end
        with open(path, "rb") as file:
            file.seek(int((part.begin + end) / 2 if len(parts) > 1 else SHARE * end))
            file.readline()
            places.append([0, number, file.tell(), 0, 0, 0])
    return {**state, "positions": [places]}


def old_position(path: Path, state: dict) -> dict:
    """As runs stored it before: the number of pieces from the beginning."""
    (source,) = open_sources(config_of(path).text, config_of(path).data)
    pieces, size = 0, 0
    for piece in source.read(source.files, {}):
        pieces, size = pieces + 1, size + len(piece.text)
        if size > SHARE * source.files[0].size * 0.9:  # JSON escapes some characters.
            break
    return {"rows": state["rows"], "positions": [[0, pieces, 0]]}


def measure(path: Path, name: str, state: dict) -> None:
    config = config_of(path)
    data = load_text(config.text, config.data, byte_tokenizer())
    stream = data.train_iterator(config.data.batch_size, 0)
    begun = last = time.monotonic()
    silence = 0.0

    def alive() -> None:
        nonlocal last, silence
        now = time.monotonic()
        silence, last = max(silence, now - last), now

    stream.alive = alive
    stream.set_state(state)
    next(stream)
    alive()
    print(f"{name}: {last - begun:.2f} s, longest silence {silence:.2f} s", flush=True)


def train(path: Path, state: dict) -> None:
    """Steps from the position until a signal, and the rest in a resumed start."""
    position, runs = path.with_suffix(".json"), path.parent / "runs"
    position.write_text(json.dumps(state))
    flags = [
        "--config=configs/pretrain_tiny.py", f"--config.run_dir={runs}",
        f"--config.text.sources=('far={path}',)", "--config.text.cache=False",
        "--config.text.tokenizer=byte", "--config.model.preset=tiny",
        "--config.data.seq_len=256", "--config.data.batch_size=8",
        "--config.checkpoint.every=2", "--config.eval.every=100",
        "--config.eval.samples_every=0", "--config.eval.max_new_tokens=4",
        "--config.export=False",
        "--config.steps=6", "--config.text.held_out_bytes=1000",
    ]  # fmt: skip
    # The first start also compiles the programs, which the second one finds.
    starts = (
        ("begun", 600, 75, ["-c", DRIVER], [str(position)]),
        ("resumed", 5, 0, ["-m", "research.train"], []),
    )
    for name, limit, code, program, end in starts:
        begun = time.monotonic()
        own = [f"--config.runtime.watchdog_s={limit}", *end]
        command = [sys.executable, *program, *flags, *own]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        seconds = time.monotonic() - begun
        print(f"{name} with watchdog_s={limit}: {seconds:.1f} s in all", flush=True)
        if done.returncode != code:
            sys.exit(done.stderr[-3000:])
    history = json.loads((runs / "run.json").read_text())["starts"][-1]
    print(f"the resumed start: {history['seconds']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4)
    gigabytes = parser.parse_args().gigabytes
    folder = Path(tempfile.mkdtemp(prefix="stream_resume_"))
    try:
        path = folder / "far.jsonl"
        make_file(path, int(gigabytes * 1e9))
        config = config_of(path)
        data = load_text(config.text, config.data, byte_tokenizer())
        state = data.train_iterator(config.data.batch_size, 0).get_state()
        print(f"{path.stat().st_size:,} bytes in {state['deals'][0][0]} shares")
        far = far_position(path, state)
        measure(path, "from the start", state)
        measure(path, "at 90 %", far)
        one = {**state, "deals": [[1, 0]], "positions": [[[0, 0, None, 0, 0, 0]]]}
        measure(path, "at 90 %, one share", far_position(path, one))
        measure(path, "at 90 %, as older runs stored it", old_position(path, state))
        train(path, far)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
