"""Pictures of every page of the studio: two widths, light and dark.

    make screenshots FLAGS="--out=screenshots"

Without --url it shows a studio over small runs that it makes; with the address that a
studio has printed, it shows that one.
"""

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evaluation_folder import DIGEST, make_evaluation
from fake_upstream import FakeUpstream, list_server, said_by_models
from playwright.sync_api import sync_playwright
from served_studio import ServedStudio
from studio_place import TOKEN, StudioPlace, eval_line, make_run, train_line

from research.studio.chats.conversation_files import Conversations
from research.studio.pages.page_view import TABS

WIDTHS, SCHEMES = (1280, 390), ("light", "dark")
# Name of the picture, address.
OTHERS = {
    "run": "/run/runs/tuned",
    "compare": "/compare?run=runs/tuned&run=runs/rank-4",
    "remove": "/remove?run=runs/rank-4",
    "branch": "/branch?run=runs/tuned&step=300&target=new",
    "plans": "/plans",
    "evaluation": f"/evaluation/runs/tuned/evaluations/{DIGEST}",
    "served": "/deploy/chat",
    "sweep": "/sweep/runs/sweep",
    "data-rows": "/data?file=embedded",
}
SWEEP = {
    "question": "Which rank suits the rows best?",
    "metric": "loss",
    "axes": [{"name": "lora.rank"}],
    "runs": [
        {"name": f"seed-{seed}", "point": [rank], "seed": seed}
        for rank, seed in (("4", 1), ("4", 2), ("16", 3))
    ],
}
REPORT = {
    "done": 2,
    "count": 3,
    "origins": {},
    "best": {
        "words": "lora.rank 16 lowers loss by 0.112 (95 % interval 0.041 to 0.183).",
        "flags": "--config.lora.rank=16",
        "run": "seed-1",
        "value": 1.4183,
    },
    "header": ["lora.rank", "seeds", "loss, mean", "against the baseline", "verdict"],
    "rows": [
        ["4", "2", "1.5302 ± 0.021", "-", "baseline"],
        ["16", "1", "1.4183", "-0.112 (-0.183 to -0.041)", "better"],
    ],
}


def make_runs(runs: Path) -> None:
    """Three runs whose losses fall."""
    for name, end, speed in (
        ("tuned", "stopped", 0.02), ("rank-4", "finished", 0.012),
        ("sweep/seed-1", "failed", 0.03),
    ):  # fmt: skip
        lines = []
        for step in range(1, 301):
            loss = 1.2 + 2 * math.exp(-speed * step) + 0.08 * math.sin(step * 7.3)
            if step % 50 == 1:
                groups = {"open_qa": loss - 0.2, "summaries": loss + 0.15}
                lines.append(eval_line(step - 1, loss, **groups))
            rate = 5e-4 * min(1, step / 30) * (1 - step / 400)
            lines.append(train_line(step, loss, learning_rate=rate))
        folder = make_run(runs / name, end, lines)
        record = json.loads((folder / "run.json").read_text())
        record["starts"][0] |= {"step": 300, "steps": 400}
        (folder / "run.json").write_text(json.dumps(record))
        (folder / "checkpoints" / "300").mkdir(parents=True)
    (runs / "sweep" / "sweep.json").write_text(json.dumps(SWEEP))
    (runs / "sweep" / "report.json").write_text(json.dumps(REPORT))
    make_evaluation(runs / "tuned")
    (runs / "prod").mkdir()
    moves = [
        {"run": run, "step": 300, "checkpoint": "", "by": "ann", "at": f"{day}T10:00Z"}
        for run, day in (("rank-4", "2026-11-26"), ("tuned", "2026-11-27"))
    ]
    (runs / "prod" / "alias.json").write_text(json.dumps({"promotions": moves}))


CHAT = {
    "base": ("There are many reasons. One of them is that males sing to attract mates, "
             "which is a complex system of communication.", 0.0),
    "tuned": ("Whales sing to find mates and to stay in touch over long ways.", 1.9),
    "rank-4": ("Whales sing to communicate, and the songs change over the years.", 0.9),
}  # fmt: skip


@contextmanager
def made_chat(place: StudioPlace, folder: Path) -> Iterator[str]:
    """A conversation and a server that answers; gives the address of its page."""
    fake = FakeUpstream(folder / "chat", said_by_models)
    own = place.runs / ".studio"
    list_server(own / "servers", "chat", uds=str(fake.path), began="2026-11-27T10:00Z")
    kept = Conversations(own / "chats")
    asked = {"text": "Why do whales sing?", "context": "", "system": ""}
    name, turn = kept.add("", {"kind": "turn", "parent": "", "chosen": "", **asked})
    columns, scores = [], []
    for number, (model, (text, far)) in enumerate(CHAT.items()):
        words = [f"{word} " for word in text.split()]
        tokens = [{"text": word, "logprob": -1.0} for word in words]
        stamp = {"base": "SmolLM2-135M-Instruct.Q4_1.gguf", "template": "chat 872be49d"}
        stamp |= {"is_base": model == "base", "step": 300, "fingerprint": "fp_6604181e"}
        ids = [*range(len(words))]
        columns.append({"model": model, "stamp": stamp, "text": text, "ids": ids})
        columns[-1] |= {"tokens": tokens, "finish": "stop", "prompt_tokens": 38}
        own_scores = [-1.0 + far * math.sin(i * (number + 2.3)) for i in ids]
        scores.append({"kind": "scores", "model": model, "own": own_scores})
        scores[-1] |= {"base": [-1.0 for _ in ids]}
    answers = {"kind": "answers", "turn": turn["id"], "server": "chat"}
    settings = {"temperature": 0.7, "seed": 1}
    _, said = kept.add(name, answers | {"settings": settings, "columns": columns})
    for line in scores[1:]:
        kept.add(name, line | {"answers": said["id"]})
    yield f"/chat?chat={name}"
    fake.stop()


def look_at_rows(place: StudioPlace) -> None:
    """A check of the embedded sample, as the Data page starts it."""
    client = place.client()
    at = client.post("/act/look", data={"file": "embedded"}).next_request.url
    while "A process reads it now" in client.get(at).text:
        time.sleep(1)


def chosen(paths: list[str]) -> dict[str, str]:
    """Addresses by names for their pictures."""
    names = (path.split("?")[0].strip("/").replace("/", "-") for path in paths)
    return {name or "runs": path for name, path in zip(names, paths, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("screenshots"))
    parser.add_argument("--url", default="")
    parser.add_argument("--path", action="append", default=[])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if options.url:
            take(
                options.url,
                chosen(options.path or [path for path, _ in TABS]),
                options.out,
            )
            return
        place = StudioPlace(Path(folder))
        make_runs(place.runs)
        server = ServedStudio(place.app)
        try:
            with made_chat(place, Path(folder)) as chat:
                look_at_rows(place)
                pages = chosen([path for path, _ in TABS]) | {"chat": chat} | OTHERS
                pages = chosen(options.path) or pages
                take(f"{server.url}/?token={TOKEN}", pages, options.out)
        finally:
            server.stop()


def take(url: str, pages: dict[str, str], out: Path) -> None:
    """Writes `NAME-WIDTH-SCHEME.png` for each page."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        for scheme in SCHEMES:
            for width in WIDTHS:
                size = {"width": width, "height": 900}
                page = browser.new_page(viewport=size, color_scheme=scheme)
                page.goto(url)
                for name, path in pages.items():
                    page.goto(url.split("/?")[0] + path)
                    page.wait_for_timeout(800)  # The charts are drawn.
                    file = out / f"{name}-{width}-{scheme}.png"
                    page.screenshot(path=file, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
