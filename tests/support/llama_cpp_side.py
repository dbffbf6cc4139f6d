"""Asks llama.cpp about GGUF files: run by an interpreter that has xllamacpp.

Reads jobs from the file in its first argument, and prints a line of JSON for each. A
job has `model`, `adapter` (a file, or ""), `texts` to tokenise, `rows` of ids, `every`,
`top` and `new`. For each row the answer has the likeliest `top` next tokens behind each
of its beginnings whose length `every` divides, and `new` greedy tokens after the row;
once without the adapter, and once with it.
"""

import json
import os
import sys
import urllib.request


def open_server(job):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    params.n_parallel, params.n_ctx = 1, 512
    params.verbosity, params.port = -1, 0
    params.warmup = False
    flash = xllamacpp.llama_flash_attn_type
    params.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
    exact = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_type_k = params.cache_type_v = exact
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = 1
    if job["adapter"]:
        adapter = xllamacpp.CommonAdapterLoraInfo(job["adapter"], 1.0)
        params.lora_adapters = [adapter]
    return xllamacpp.Server(params)


def complete(server, ids, count, top, scale):
    """Up to `count` greedy tokens after `ids`, each with the likeliest `top`."""
    body = {
        "prompt": ids, "n_predict": count, "temperature": -1, "n_probs": top,
        "cache_prompt": False, "logprobs": top,
    }  # fmt: skip
    if scale is not None:
        body["lora"] = [{"id": 0, "scale": scale}]
    answer = server.handle_completions(body)
    if "choices" not in answer:
        raise RuntimeError(str(answer))
    return answer["choices"][0]["logprobs"]["content"]


def next_tokens(server, ids, top, scale):
    """The likeliest `top` tokens after `ids`: `[[id, log-probability], ...]`."""
    (first,) = complete(server, ids, 1, top, scale)
    return [[x["id"], x["logprob"]] for x in first["top_logprobs"]]


def measure(server, job, scale):
    rows, greedy = [], []
    for row in job["rows"]:
        begun = range(job["every"], len(row) + 1, job["every"])
        rows.append([next_tokens(server, row[:n], job["top"], scale) for n in begun])
        found = complete(server, row, job["new"], 1, scale)
        greedy.append([token["id"] for token in found])
    return {"rows": rows, "greedy": greedy}


def tokenise(server, text):
    body = {"content": text, "add_special": False, "parse_special": True}
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["tokens"]


def main():
    # The library writes to stdout, too.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    for job in jobs:
        server = open_server(job)
        answer = {"tokens": [tokenise(server, text) for text in job["texts"]]}
        if job["adapter"]:
            answer["base"] = measure(server, job, 0.0)
            answer["adapted"] = measure(server, job, 1.0)
        else:
            answer["base"] = measure(server, job, None)
        print(json.dumps(answer), file=out, flush=True)
        del server


if __name__ == "__main__":
    main()
