"""The real command in two processes: the first listens, and the other follows it."""

import re
import shutil
import signal
import socket

import httpx
import openai
import pytest
from free_ports import free_port
from waiting import PATIENCE, wait_until

ASK = [{"role": "user", "content": "Are whales fish?"}]


def start(place, count, *flags, port=0):
    """The command in some processes that have two devices together."""
    address = f"localhost:{free_port()}"
    return [
        place.start(
            "serve", f"--port={port}", "--slots=2", "--context=128", *flags,
            *["--distributed"] * (count > 1), devices=2, forked=False,
            more={"JAX_NUM_CPU_DEVICES": str(2 // count)} | {
                "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(rank),
            },
        )
        for rank in range(count)
    ]  # fmt: skip


def url_of(running):
    running.wait_for("ready ")
    return re.search(r"http://[\d.]+:\d+", "".join(running._said["err"]))[0]


def answers(url, runs):
    """The answers of all models, also of one that is loaded, followed and removed."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:

        def said(model, **more):
            found = client.chat.completions.create(
                model=model, messages=ASK, max_tokens=12, logprobs=True, **more
            )
            [choice] = found.choices
            return choice.message.content, [x.logprob for x in choice.logprobs.content]

        def load(name, path, status):
            body = {"lora_name": name, "lora_path": str(path)}
            found = httpx.post(
                f"{url}/v1/load_lora_adapter", json=body, timeout=PATIENCE
            )
            assert found.status_code == status, found.text

        found = [said(card.id) for card in client.models.list().data]
        drawn = {"temperature": 1.0, "seed": 3, "logit_bias": {"5": 2}, "stop": "zz"}
        found.append(said("tuned", **drawn))
        with pytest.raises(openai.BadRequestError):
            bias = {str(i): 1 for i in range(301)}
            said("base", logit_bias=bias)
        load("more", runs / "tuned", 200)
        load("wrong", runs / "other", 400)
        found.append(said("more"))
        step = client.models.retrieve("behind").step
        newest = client.models.retrieve("tuned").step
        place = runs / "behind" / "checkpoints" / str(newest)
        shutil.copytree(runs / str(newest), place)
        wait_until(lambda: client.models.retrieve("behind").step != step)
        found.append(said("behind"))
        shutil.rmtree(place)
        return found


@pytest.mark.soak
def test_two_processes_serve_as_one_does(place, runs):
    flags = (f"--run={runs / 'tuned'}", f"--run={runs / 'behind'}", "--adapters=3")
    found = {}
    for count in (2, 1):
        running = start(place, count, *flags)
        try:
            found[count] = answers(url_of(running[0]), runs)
        finally:
            running[0].send(signal.SIGTERM)
            ended = [process.finish() for process in running]
        for each in ended:
            assert each.code == 0 and "Traceback" not in each.err, each.err[-3000:]
    assert found[2] == found[1]
    tuned, behind, base, drawn, more, followed = found[2]
    assert tuned == more == followed and len({x[0] for x in (tuned, base, drawn)}) == 3
    assert behind != tuned


@pytest.mark.soak
@pytest.mark.parametrize("flags", [(), ("--weights=int8",)])
def test_a_process_that_dies_ends_the_server_with_a_sentence(place, flags):
    first, second = start(place, 2, "--model=model", *flags)
    url = url_of(first)
    body = {"model": "base", "prompt": "a", "max_tokens": 100, "ignore_eos": True}
    body |= {"stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE):
        second.send(signal.SIGKILL)
        ended = first.finish()
    second.finish()
    assert ended.code == 6 and "Traceback" not in ended.err, ended.err[-3000:]
    assert "another process of this server is gone" in ended.err.splitlines()[-1]


@pytest.mark.soak
def test_flags_that_differ_or_a_port_in_use_end_both(place):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        both = start(place, 2, "--model=model", port=port)
        ended = [process.finish() for process in both]
    assert [x.code for x in ended] == [2, 2]
    assert all("another process listens there" in x.err for x in ended)
