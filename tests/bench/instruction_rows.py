"""Start of a run on many instruction rows: seconds and memory, first and later.

    python tests/bench/instruction_rows.py --rows=10000,100000,1000000

Makes rows of about 200 characters, and loads each number of them twice, each time in a
process of its own: first without a cache, then with the one that the first has left. A
load ends with what the doctor reads and the first training batch. A tokenizer with one
token a byte stands for the model's, so a row has about 200 ids.

Memory is what the load adds to the process, at its peak: the imports and the tokenizer
are there before it. Rows and caches are deleted afterwards.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

WORDS = ["river", "stone", "quiet", "seven", "window", "paper", "yellow", "margin"]


def make_rows(file: Path, count: int) -> None:
    with open(file, "w", encoding="utf-8") as rows:
        for i in range(count):
            text = " ".join(WORDS[(i * 7 + k * k) % 8] for k in range(25 + i % 5))
            row = {
                "instruction": f"Continue from {i}.",
                "response": text,
                "category": WORDS[i % 8],
            }
            rows.write(json.dumps(row) + "\n")


def load(file: Path, cache: Path) -> dict[str, float]:
    """Loads the rows in this process, as a start of a run does."""
    from research.config.run_config import Config, DataConfig, TextConfig
    from research.tasks.instruction_tuning import InstructionTask
    from research.tokenize.tokenizer_training import byte_tokenizer

    config = Config(
        data=DataConfig(path=str(file), template="dolly"),
        text=TextConfig(cache_dir=str(cache)),
    )
    tokenizer = byte_tokenizer()
    before = peak_megabytes()
    begun = time.monotonic()
    task = InstructionTask(config, tokenizer, 2048)
    task.examine()
    next(iter(task.batches(range(config.data.batch_size))))
    seconds = time.monotonic() - begun
    return {"seconds": seconds, "megabytes": peak_megabytes() - before}


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_own_process(file: Path, cache: Path) -> dict[str, float]:
    command = [sys.executable, __file__, f"--load={file}", f"--cache={cache}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="10000,100000,1000000")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(arguments.load, arguments.cache)))
        return
    print("| rows | first start | memory | second start | memory |")
    print("|---:|---:|---:|---:|---:|")
    for count in map(int, arguments.rows.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "rows.jsonl")
            make_rows(file, count)
            starts = [in_own_process(file, Path(folder, "cache")) for _ in range(2)]
        cells = [f"{s['seconds']:.1f} s | {s['megabytes']:.0f} MB" for s in starts]
        print(f"| {count:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
