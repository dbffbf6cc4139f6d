"""The queue: one job at a time, in order, whoever dies; and the buttons of a run."""

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from studio_place import StudioPlace, make_run
from waiting import PATIENCE, wait_until

from research.config.run_config import Config
from research.core.errors import UserError
from research.runs.control.job_logs import last_error, progress, tail
from research.runs.control.request_files import pending
from research.studio.jobs import job_commands
from research.studio.jobs.__main__ import main
from research.studio.jobs.job_queue import MACHINE, JobQueue, queue_folder
from research.studio.jobs.queue_worker import run_detached, work_off


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """A queue whose jobs nobody works off unless a test does."""
    monkeypatch.setattr(JobQueue, "work", lambda self: None)
    return JobQueue(tmp_path / "queue")


def add(queue, tmp_path, *names, program="print(1)"):
    command = [sys.executable, "-c", program]
    return [queue.add(command, tmp_path / name, "me").id for name in names]


def names(jobs):
    return [Path(job.place).name for job in jobs]


def test_jobs_run_in_the_order_that_people_gave_them(queue, tmp_path):
    first, _, third = add(queue, tmp_path, "a", "b", "c")
    queue.move(third, -1)
    queue.move(first, 9)
    queue.move(third, -9)
    with pytest.raises(UserError, match="waits or runs already"):
        add(queue, tmp_path, "a")
    assert names(JobQueue(queue.folder).read().waiting) == ["c", "b", "a"]
    ran = []

    def run(job, _):
        ran.append(Path(job.place).name)
        assert names(queue.read().running) == ran[-1:]
        if ran == ["c"]:  # Somebody else adds and removes while a job runs.
            add(queue, tmp_path, "d")
            queue.remove(first)
            with pytest.raises(UserError, match="does not wait any more"):
                queue.remove(third)
        return len(ran)

    assert work_off(queue, run) == 3 and ran == ["c", "b", "d"]
    jobs = queue.read()
    assert not jobs.waiting and not jobs.running
    assert [job.exit_code for job in jobs.ended] == [3, 2, 1]


def test_a_job_holds_the_machine_after_its_worker_is_killed(queue, tmp_path):
    """The next worker waits for it, and says that nobody saw its end."""
    go = tmp_path / "go"
    # It ends by itself, too: a test that is killed leaves no process.
    waits = f"time.sleep(0 if pathlib.Path({str(go)!r}).exists() else .05)"
    waits = f"for _ in range(20 * {PATIENCE}): {waits}"
    program = f"import pathlib, time\n{waits}\nprint('end')"
    add(queue, tmp_path, "a", "b", program=program)
    command = [sys.executable, "-m", "research.studio.jobs", f"--queue={queue.folder}"]
    worker = subprocess.Popen(command, start_new_session=True)
    wait_until(lambda: any(job.is_alive for job in queue.read().running))
    worker.kill()
    worker.wait()
    with open(queue.folder / MACHINE) as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert names(queue.read().running) == ["a"], "the job has not ended with it"
    go.touch()
    assert main(["jobs", f"--queue={queue.folder}"]) == 0
    jobs = queue.read()
    assert names(jobs.ended) == ["b", "a"]
    assert [job.exit_code for job in jobs.ended] == [0, None]
    assert tail(tmp_path / "b.log", 99) == "end\n"


def test_a_command_that_cannot_start_is_said_in_its_log(queue, tmp_path):
    queue.add([str(tmp_path / "absent")], tmp_path / "a", "me")
    assert work_off(queue, lambda job, lock: run_detached(queue, job, lock)) == 1
    assert queue.read().ended[0].exit_code == 127
    assert "cannot be started" in tail(tmp_path / "a.log", 999)


def test_any_command_is_a_job_with_a_name_and_a_log(queue, tmp_path):
    """Two may write below one run, as two evaluations do; none shares a log."""
    command = [sys.executable, "-m", "research.evaluate", "--run=a"]
    for log in ("1.log", "2.log"):
        log = tmp_path / "logs" / log
        queue.add(command, tmp_path / "a", "me", name="evaluate a", log=log)
    with pytest.raises(UserError, match="evaluate a waits or runs already"):
        queue.add(command, tmp_path / "b", "me", name="evaluate a", log=log)
    assert work_off(queue, lambda job, _: 0) == 2
    assert {job.log.name for job in queue.read().ended} == {"1.log", "2.log"}
    assert {job.door for job in queue.read().ended} == {"research.evaluate"}


def test_a_queue_of_an_earlier_version_is_read(queue, tmp_path):
    queue.folder.mkdir()
    job = {"id": "1", "command": ["true"], "run": str(tmp_path / "a"), "folder": "/"}
    jobs = {"waiting": [job | {"added": "2026"}], "running": [], "ended": []}
    (queue.folder / "jobs.json").write_text(json.dumps(jobs))
    (found,) = queue.read().waiting
    assert found.target == tmp_path / "a" and found.log == tmp_path / "a.log"


def test_an_open_page_sees_how_far_a_job_is_since_it_began(idle):
    queue, client = idle.state.queue, idle.client()
    (idle.runs / "a.log").write_text("39 of 40 answers <b>\n")
    program = "print('losses of 2 models'); print('3 of 8 answers')"
    (name,) = add(queue, idle.runs, "a", program=program)
    address = f"/api/job/{name}"
    waits = {"state": "waiting", "progress": None, "log": "", "page": ""}
    assert client.get(address).json() == waits

    def run(job, lock):
        code = run_detached(queue, job, lock)
        found = client.get(address).json()
        assert found["state"] == "running" and found["progress"] == [3, 8]
        assert found["log"] == "losses of 2 models\n3 of 8 answers\n"
        # The page of what it makes is there as soon as that is.
        assert found["page"] == ""
        make_run(idle.runs / "a", "killed")
        assert client.get(address).json()["page"] == "/run/runs/a"
        assert 'max="8" value="3"' in client.get("/queue").text
        return code

    work_off(queue, run)
    assert client.get(address).json()["state"] == "ended"
    assert client.get("/api/job/absent").status_code == 404
    assert progress("step 5/20  loss 1") == (5, 20) and progress("9 of 8 rows") is None


def test_a_damaged_queue_says_what_to_do(queue):
    queue.folder.mkdir()
    (queue.folder / "jobs.json").write_text('{"waiting": [1]}')
    with pytest.raises(UserError, match="jobs that wait are forgotten"):
        queue.read()
    with pytest.raises(UserError, match=r"holds no jobs\.json"):
        main(["jobs", "--queue=absent"])


@pytest.fixture
def idle(tmp_path, monkeypatch):
    """A studio whose jobs nobody works off."""
    monkeypatch.setattr(JobQueue, "work", lambda self: None)
    monkeypatch.chdir(tmp_path)
    return StudioPlace(tmp_path)


def test_a_request_is_a_file_that_the_job_reads(idle):
    run = make_run(idle.runs / "a")
    client, form = idle.client(), {"run": "runs/a", "kind": "checkpoint"}
    assert client.post("/act/request", data=form).status_code == 400
    with open(run / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert client.post("/act/request", data=form).status_code == 303
        bad = client.post("/act/request", data=form | {"kind": "explode"})
        assert bad.status_code == 400 and "is not a request" in bad.text
        page = client.get("/run/runs/a").text
    assert [request.kind for request in pending(run)] == ["checkpoint"]
    for kind in ("stop", "checkpoint", "sample"):
        assert f"-m research.runs --run=runs/a {kind}" in page


def test_a_resumption_is_the_command_that_the_page_shows(idle):
    make_run(idle.runs / "a")
    client = idle.client()
    python = job_commands.python()
    command = [python, "-m", "launch", "local", "--", "--config=runs/a"]
    assert job_commands.as_text(command) in client.get("/run/runs/a").text
    assert client.post("/act/resume", data={"run": "runs/a"}).status_code == 303
    (job,) = idle.state.queue.read().waiting
    assert [*job.command] == command and job.folder == os.getcwd()
    assert client.post("/act/resume", data={"run": "runs/a"}).status_code == 400
    assert "waits" in client.get("/run/runs/a").text
    assert '<span class="state queued"' in client.get("/").text
    line = idle.state.audit.read()[0]
    assert line["action"] == "start" and line["command"].endswith("--config=runs/a")


def test_a_branch_shows_its_knobs_before_it_starts(idle):
    knobs = {
        "model": dataclasses.replace(Config().model, init_from="", preset="tiny"),
        "data": dataclasses.replace(Config().data, kind="text"),
        "text": dataclasses.replace(Config().text, sources=("a=data/b",)),
    }
    run = make_run(idle.runs / "a", trainable="full", **knobs)
    (run / "checkpoints" / "20").mkdir(parents=True)
    client = idle.client()
    fields = {"run": "runs/a", "step": "20", "target": "b"}
    fields["changes"] = "--config.optim.learning_rate=0.25"
    shown = client.get("/branch", params=fields).text
    assert '<td class="text block">optim.learning_rate</td>' in shown
    assert "--config.model.init_from=runs/a@20" in shown
    assert client.post("/act/branch", data=fields).status_code == 303
    (job,) = idle.state.queue.read().waiting
    assert job.command[5:] == (
        "--config=runs/a", "--config.run_dir=runs/b",
        "--config.model.init_from=runs/a@20", "--config.model.preset=",
        "--config.optim.learning_rate=0.25",
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"target": "../../out"}, "no name for a folder"),
        ({"target": "/etc"}, "no name for a folder"),
        ({"target": "a"}, "is there already"),
        ({"changes": "--config=evil.py"}, "is no knob"),
        ({"changes": "--config.optim.learning_rat=1"}, "learning_rate"),
        ({"changes": "--config.run_dir=/tmp/out"}, "given several times"),
        ({"changes": "'"}, "No closing quotation"),
        ({"step": "x"}, "no checkpoint of this run"),
        ({"step": "21"}, "no checkpoint of this run"),
    ],
)
def test_a_branch_that_would_not_start_is_refused(idle, changes, problem):
    run = make_run(idle.runs / "a")
    (run / "checkpoints" / "20").mkdir(parents=True)
    fields = {"run": "runs/a", "step": "20", "target": "b", "changes": ""} | changes
    client = idle.client()
    assert problem in client.get("/branch", params=fields).text
    answer = client.post("/act/branch", data=fields)
    assert answer.status_code in (400, 403)
    assert not idle.state.queue.read().waiting


def test_the_queue_page_moves_removes_and_ends_jobs(idle):
    queue, client = idle.state.queue, idle.client()
    program = "import time; time.sleep(600)"
    a, b, c = add(queue, idle.runs, "a", "b", "c", program=program)
    for job, action in ((c, "up"), (a, "down"), (b, "remove")):
        form = {"job": job, "action": action}
        assert client.post("/act/queue", data=form).status_code == 303
    assert names(queue.read().waiting) == ["c", "a"]
    assert client.post("/act/queue", data={"job": b, "action": "up"}).status_code == 400
    assert client.post("/act/queue", data={"job": a, "action": "?"}).status_code == 400

    def end_at_once(job, lock):
        if job.id == a:
            return 0
        import threading

        def end():
            wait_until(lambda: any(x.is_alive for x in queue.read().running))
            client.post("/act/queue", data={"job": c, "action": "end"})

        thread = threading.Thread(target=end)
        thread.start()
        code = run_detached(queue, job, lock)
        thread.join()
        return code

    assert work_off(queue, end_at_once) == 2
    assert [x.exit_code for x in queue.read().ended] == [0, -signal.SIGTERM]
    text = client.get("/queue").text
    assert "failed with code -15" in text and "It has written nothing." in text
    assert [x["action"] for x in idle.state.audit.read()] == [
        *("up job", "down job", "remove job", "up job", "end job")
    ]


def test_a_failed_run_shows_the_last_message_of_its_command(idle):
    assert last_error("step 1\nan error: no\n") == ""
    assert (
        last_error("error: first\n\nerror: second\n  fix\n") == "error: second\n  fix"
    )
    make_run(idle.runs / "a", "failed")
    (idle.runs / "a.log").write_text("step 1\nerror: no room\nmake some <b>\n")
    page = idle.client().get("/run/runs/a").text
    assert "error: no room\nmake some &lt;b&gt;</p>" in page


def test_machines_that_share_runs_have_queues_of_their_own(tmp_path):
    assert queue_folder(tmp_path).name == f"queue-{os.uname().nodename}"


def test_the_log_shows_the_last_state_of_a_line_that_is_written_again(tmp_path):
    (tmp_path / "a.log").write_bytes(b"x" * 99 + b"\nstep 1\rstep 2\rstep 3\r\n\xffend")
    assert tail(tmp_path / "a.log", 40).splitlines()[-2:] == ["step 3", "\ufffdend"]
    (tmp_path / "link.log").symlink_to("/etc/passwd")
    assert tail(tmp_path / "link.log", 99) == ""
