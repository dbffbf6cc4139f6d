"""Speed and memory of pre-training text: tokenised once, then read at random.

    python tests/bench/text_pipeline.py --sizes=10,100,1000

Makes one .jsonl of each size in megabytes, from the standard library's text, and does
each of these in a process of its own:

- plain: `tokenizers` alone encodes the first 10 MB, all cores, nothing read or kept;
- build: a cache of each size is made; the ratio to plain is of bytes per second;
- read: batches at random from each cache, on one core.

Peak memory is of the process, and includes about 200 MB of imports.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from research.config.run_config import Config, DataConfig, TextConfig
from research.data.text.choose_tokenizer import training_texts
from research.data.text.text_sources import open_sources
from research.data.text.tokenized_corpus import load_text
from research.tokenize.tokenizer import from_folder
from research.tokenize.tokenizer_training import save_tokenizer, train_bpe

SEQ_LENS = (256, 2048)
PLAIN_BYTES = 10_000_000
ROWS = 32


def config_of(folder: Path, size: int, seq_len: int = 256) -> Config:
    return Config(
        data=DataConfig(seq_len=seq_len),
        text=TextConfig(
            sources=(f"text={folder / f'{size}.jsonl'}",),
            cache_dir=str(folder / "cache"),
        ),
    )


def make_text(folder: Path, size: int) -> None:
    """Documents of the standard library, each time with another first line."""
    (source,) = open_sources(TextConfig(sources=("stdlib=stdlib",)), DataConfig())
    texts = [item.path.read_text(encoding="utf-8") for item in source.files]
    written = 0
    with open(folder / f"{size}.jsonl", "w", encoding="utf-8") as file:
        for number, text in enumerate(itertools.cycle(texts)):
            if written >= size * 1_000_000:
                return
            document = f"# {number}\n{text}"
            written += len(document.encode())
            file.write(json.dumps({"text": document}) + "\n")


def plain(folder: Path, size: int) -> dict[str, float]:
    lines = itertools.islice((folder / f"{size}.jsonl").open(encoding="utf-8"), 10**6)
    texts, total = [], 0
    for line in lines:
        texts.append(json.loads(line)["text"])
        total += len(texts[-1].encode())
        if total >= PLAIN_BYTES:
            break
    inner = from_folder(folder / "tokenizer")._text_view
    found = {}
    for name, encode in (
        ("mb_per_s", inner.encode_batch),
        ("fast_mb_per_s", inner.encode_batch_fast),
    ):
        begun = time.perf_counter()
        encode(texts, add_special_tokens=False)
        found[name] = total / 1e6 / (time.perf_counter() - begun)
    return found


def build(folder: Path, size: int) -> dict[str, float]:
    config = config_of(folder, size)
    tokenizer = from_folder(folder / "tokenizer")
    begun = time.perf_counter()
    data = load_text(config.text, config.data, tokenizer)
    seconds = time.perf_counter() - begun
    total = data.train["text"] + data.held_out["text"]
    return {"mb_per_s": total.bytes / 1e6 / seconds, "tokens": total.tokens}


def read(folder: Path, size: int) -> dict[str, float]:
    os.sched_setaffinity(0, {0})
    tokenizer = from_folder(folder / "tokenizer")
    found = {}
    for seq_len in SEQ_LENS:
        config = config_of(folder, size, seq_len)
        data = load_text(config.text, config.data, tokenizer)
        batches = data.train_iterator(ROWS, seed=0)
        next(batches)
        begun, count = time.perf_counter(), 0
        # One epoch: every page of the cache has been touched at its end.
        while count < data.train["text"].tokens:
            count += next(batches).tokens.size
        found[f"tokens_per_s_{seq_len}"] = count / (time.perf_counter() - begun)
    return found


STEPS = {"plain": plain, "build": build, "read": read}


def measured(step: str, folder: Path, size: int) -> dict[str, float]:
    """Return the output of a step in a fresh process, and its peak memory."""
    done = subprocess.run(
        [sys.executable, __file__, f"--step={step}", f"--folder={folder}",
         f"--sizes={size}"],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def peak_mb() -> float:
    """Peak memory of this process alone: `ru_maxrss` begins at the parent's."""
    status = Path("/proc/self/status").read_text()
    (line,) = [x for x in status.splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="10,100", help="megabytes, as 10,100")
    parser.add_argument("--folder", help="where text and caches go; a temporary one")
    parser.add_argument("--vocab", type=int, default=4096, help="ids of the tokenizer")
    parser.add_argument("--step", choices=STEPS, help="one step alone, for itself")
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    if args.step:
        found = STEPS[args.step](Path(args.folder), sizes[0])
        print(json.dumps({**found, "peak_mb": peak_mb()}))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        compare(Path(name), sizes, args.vocab)


def compare(folder: Path, sizes: list[int], vocab: int) -> None:
    texts = training_texts(
        open_sources(TextConfig(sources=("stdlib=stdlib",)), DataConfig()),
        held_out_share=0.01,
    )
    save_tokenizer(train_bpe(texts, vocab), folder / "tokenizer")
    for size in sizes:
        make_text(folder, size)
    before = measured("plain", folder, sizes[0])
    builds = {size: measured("build", folder, size) for size in sizes}
    after = measured("plain", folder, sizes[0])
    plain, fast = (
        (before[name] + after[name]) / 2 for name in ("mb_per_s", "fast_mb_per_s")
    )
    print(f"encode_batch: {plain:.2f} MB/s, encode_batch_fast: {fast:.2f} MB/s")
    print("size MB | build MB/s, to each, peak MB | read", end="")
    print(", ".join(f" Mtokens/s at {n}" for n in SEQ_LENS), "| peak MB")
    for size in sizes:
        made, got = builds[size], measured("read", folder, size)
        speeds = ", ".join(f"{got[f'tokens_per_s_{n}'] / 1e6:.1f}" for n in SEQ_LENS)
        print(
            f"{size} | {made['mb_per_s']:.2f}, {made['mb_per_s'] / plain:.2f}, "
            f"{made['mb_per_s'] / fast:.2f}, {made['peak_mb']:.0f} | {speeds} | "
            f"{got['peak_mb']:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
