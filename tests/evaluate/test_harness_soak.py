"""The whole lm-evaluation-harness on tasks of ours: in process, and over the server."""

import importlib.util
import json
import re
import signal

import pytest

# Tasks in the harness's own format. They need no network.
ROWS = {
    "animals": [
        {"question": "Which can fly?", "choices": ["a sparrow", "a whale"], "at": 0},
        {"question": "Trout live", "choices": ["in trees", "in rivers"], "at": 1},
        {"question": "Bees make", "choices": ["milk", "silk", "honey"], "at": 2},
    ],
    "answers": [
        {"question": "Name a colour.", "answer": "red"},
        {"question": "How many days has a week?", "answer": "seven"},
        {"question": "Löwe oder Ente?", "answer": "Ente"},
    ],
}  # fmt: skip
TASKS = {
    "animals": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: at
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "answers": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{answer}}"
metric_list: [{metric: byte_perplexity}]
""",
}
PLAIN, CHAT = ("animals", "answers", "rolling"), ("answers",)


def write_tasks(folder):
    folder.mkdir()
    for name, rows in ROWS.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    for name, task in TASKS.items():
        file = folder / f"{name if name in ROWS else 'answers'}.jsonl"
        files = json.dumps({"test": str(file)})
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {files}}}\n{task}"
        )
    return folder


def flags(folder, tasks, out, *more):
    where = ("--include_path", str(folder), "--output_path", str(out))
    return ("--tasks", ",".join(tasks), *where, "--log_samples", *more)


def responses(out):
    """The answers of the model by task, row and choice; and the metrics by task."""
    given, metrics = {}, {}
    for file in out.rglob("samples_*.jsonl"):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            name = re.match(r"samples_(\w+)_\d{4}", file.name)[1]
            given[name, row["doc_id"]] = row["filtered_resps"]
    for file in out.rglob("results_*.json"):
        metrics |= json.loads(file.read_text())["results"]
    return given, metrics


def assert_equal(found, expected):
    assert found.keys() == expected.keys() and found
    for key, each in found.items():
        for ours, theirs in zip(each, expected[key], strict=True):
            if isinstance(ours, str):
                assert ours == theirs
            else:  # A log-likelihood, and of a choice whether it is greedy.
                ours, theirs = (
                    [x] if isinstance(x, float) else x for x in (ours, theirs)
                )
                assert float(ours[0]) == pytest.approx(float(theirs[0]), abs=1e-4)
                assert str(ours[1:]) == str(theirs[1:])


@pytest.mark.soak
@pytest.mark.parametrize("model", ["tuned", "base"])
def test_the_harness_gets_the_same_from_the_engine_and_the_server(
    place, unbroken, tmp_path, model
):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("the extra lm-eval is not installed")
    tasks, run = write_tasks(tmp_path / "tasks"), str(place.run_dir("unbroken"))
    more = {"HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    in_process = {}
    for name, these, flag in (
        ("plain", PLAIN, ()),
        ("chat", CHAT, ("--apply_chat_template",)),
    ):
        out = tmp_path / f"process-{name}"
        own = flags(tasks, these, out, *flag)
        which = ("--compare",) if model == "base" else ()
        ended = place.start_python(
            "-m", "research.evaluate.harness", f"--run={run}", *which, "--", *own,
            more=more,
        ).finish()  # fmt: skip
        assert ended.code == 0, ended.err[-3000:]
        assert {x.name for x in out.iterdir()} == {model, "tuned"}
        in_process[name] = responses(out / model)
    server = place.start("serve", f"--run={run}", "--port=0", "--slots=2", forked=False)
    server.allow(600)
    try:
        server.wait_for("ready ")
        url = re.search(r"http://[\d.]+:\d+", "".join(server._said["err"]))[0]
        served = "unbroken" if model == "tuned" else "base"
        for name, these, kind, path, flag in (
            (
                "plain",
                PLAIN,
                "local-completions",
                "completions",
                "tokenizer_backend=remote",
            ),
            (
                "chat",
                CHAT,
                "local-chat-completions",
                "chat/completions",
                "num_concurrent=1",
            ),
        ):
            out = tmp_path / f"server-{name}"
            args = f"model={served},base_url={url}/v1/{path},{flag}"
            own = flags(tasks, these, out)
            if name == "chat":
                own = (*own, "--apply_chat_template")
            ended = place.start_python(
                "-m", "lm_eval", "run", "--model", kind, "--model_args", args, *own,
                more=more,
            ).finish()  # fmt: skip
            assert ended.code == 0, ended.err[-3000:]
            given, metrics = responses(out)
            expected, same = in_process[name]
            assert_equal(given, expected)
            for task in these:
                print(model, name, task, metrics[task])
                assert metrics[task].keys() == same[task].keys()
    finally:
        server.send(signal.SIGTERM)
        server.finish()
