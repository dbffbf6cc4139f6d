"""The real command for ten minutes at twice its capacity, and its end by a signal."""

import asyncio
import collections
import random
import re
import signal
import time

import httpx
import psutil
import pytest
from live_servers import drop_connections

MINUTES, SLOTS, QUEUE, CLIENTS = 10, 4, 8, 24
SETTLED = 60  # seconds after which the memory of the server must stay
GROWTH = 40 << 20  # bytes


async def ask_for_ever(url, seed, over, counts):
    """Asks in all ways, leaves some answers, and counts how all of them ended."""
    draw = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        while time.monotonic() < over:
            prompts = ["x" * draw.randint(1, 60)] * draw.choice([1, 3])
            body = {
                "model": "base", "prompt": prompts,
                "max_tokens": draw.randint(1, 60), "temperature": draw.choice([0, 1]),
                "stream": draw.random() < 0.5, "ignore_eos": True,
            }  # fmt: skip
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code == 429:
                    counts["refused"] += 1
                    await asyncio.sleep(float(answer.headers["retry-after"]))
                elif draw.random() < 0.1:
                    counts["left"] += 1
                else:
                    text = (await answer.aread()).decode()
                    done = "[DONE]" in text if body["stream"] else '"usage"' in text
                    whole = done and answer.status_code == 200 and '"error"' not in text
                    counts["answered" if whole else "lost"] += 1


async def soak(url, process, seconds):
    """How requests ended, and the memory of the server once settled and at the end."""
    counts, over = collections.Counter(), time.monotonic() + seconds
    clients = [ask_for_ever(url, seed, over, counts) for seed in range(CLIENTS)]
    asking = asyncio.gather(*clients)
    await asyncio.sleep(min(SETTLED, seconds / 2))
    settled = process.memory_info().rss
    port = int(url.rpartition(":")[2])
    await asyncio.to_thread(drop_connections, port, 1000)
    await asking
    return counts, settled, process.memory_info().rss


@pytest.mark.soak
def test_ten_minutes_at_twice_the_capacity(place):
    running = place.start(
        "serve", "--model=model", "--port=0", f"--slots={SLOTS}", f"--queue={QUEUE}",
        "--context=128", "--adapters=0",
    )  # fmt: skip
    running.allow(MINUTES * 60 + 300)
    try:
        running.wait_for("ready ")
        said = "".join(running._said["err"])
        url = re.search(r"http://[\d.]+:\d+", said)[0]
        process = psutil.Process(running._process.pid)
        counts, settled, ended = asyncio.run(soak(url, process, MINUTES * 60))
        assert counts["answered"] > 100 and counts["refused"] and not counts["lost"]
        assert ended - settled < GROWTH
        time.sleep(2)
        gauges = httpx.get(f"{url}/metrics", timeout=300).text
        assert "research:num_requests_running 0" in gauges
        assert "research:num_requests_waiting 0" in gauges
        print(counts, f"{(ended - settled) >> 20} MiB more")
    finally:
        running.send(signal.SIGTERM)
        done = running.finish()
    assert done.code == 0 and "Traceback" not in done.err, done.err[-2000:]
