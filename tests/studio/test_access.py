"""Who comes in: token, cookie, Host, Origin, rights of a key, and which paths."""

import json
import socket

import pytest
from studio_place import TOKEN, URL, StudioPlace, make_run

from research.core.errors import UserError
from research.studio.__main__ import main
from research.studio.access import make_token
from research.studio.checks.config_presets import first_preset
from research.studio.jobs.job_queue import JobQueue
from research.studio.page_errors import PageError
from research.studio.pages.page_view import address, counted
from research.studio.roots import Roots

USER = "a-key-that-only-looks"


def test_the_token_becomes_a_cookie_that_no_script_and_no_other_site_has(site):
    client = site.stranger()
    assert client.get("/").status_code == 401
    answer = client.get(f"/?token={TOKEN}&q=x")
    assert (answer.status_code, answer.headers["location"]) == (303, "/?q=x")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert TOKEN not in cookie and "_8700=" in cookie
    assert client.get("/").status_code == 200
    assert site.stranger().get("/").status_code == 401


@pytest.mark.parametrize("given", ["", "wrong", TOKEN[:-1], TOKEN.upper(), "%00", "é"])
def test_another_token_opens_nothing(site, given):
    client = site.stranger()
    assert client.get(f"/?token={given}").status_code == 401
    client.cookies.set("research_studio_8700", given.encode("utf-8").hex())
    assert client.get("/").status_code == 401


def test_the_cookie_still_opens_after_a_restart(tmp_path):
    client = StudioPlace(tmp_path).client()
    again = StudioPlace(tmp_path).stranger()
    again.cookies = client.cookies
    assert again.get("/").status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example:8700", "127.0.0.1.evil.example", "", "127.0.0.1:8700@evil.com"),
        *("127.0.0.1:", "127.0.0.1:x", "[::1", "127.0.0.1:8700:1", "10.0.0.7:8700"),
    ],
)
def test_a_name_that_leads_here_is_refused(site, host):
    answer = site.client().get("/", headers={"host": host})
    assert answer.status_code == 403
    assert "no name of this server" in answer.text


@pytest.mark.parametrize(
    "host, status",
    [
        *(("evil.example:8700", 403), ("10.0.0.7:8700@evil.example", 403), ("", 403)),
        *(("10.0.0.7:8700", 401), ("[fe80::7]:8700", 401), ("10.0.0.7.evil.test", 403)),
        *(("Studio.Example.ORG", 401), (socket.gethostname(), 401), ("[::g]", 403)),
    ],
)
def test_a_public_server_answers_to_its_addresses_and_names(tmp_path, host, status):
    names = ["studio.example.org"]
    site = StudioPlace(tmp_path, host="0.0.0.0", names=names)
    assert site.stranger().get("/", headers={"host": host}).status_code == status


@pytest.mark.parametrize("name", ["*", "a.test:80", "http://a.test", ""])
def test_a_name_is_that_of_a_host(name):
    with pytest.raises(UserError, match="is no host name"):
        main(["studio", f"--name={name}"])


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_a_page_of_another_origin_changes_nothing(site, headers):
    make_run(site.runs / "a")
    form = {"run": "runs/a", "tags": "forged", "notes": ""}
    answer = site.client().post("/act/notes", data=form, headers=headers)
    assert answer.status_code == 403
    assert not (site.runs / "a" / "notes.json").exists()
    own = site.client().post("/act/notes", data=form, headers={"origin": URL})
    assert own.status_code == 303
    assert json.loads((site.runs / "a" / "notes.json").read_text())["tags"]


def test_a_key_that_only_looks_changes_nothing_and_sees_no_button(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(JobQueue, "work", lambda self: None)
    monkeypatch.chdir(tmp_path)
    site = StudioPlace(tmp_path, f"{USER}\nadmin {TOKEN}", host="0.0.0.0")
    make_run(site.runs / "a")
    client = site.client(USER)
    site.state.queue.add(["python", "-m", "launch.sweep"], site.runs, "ann", name="s")
    train = address("/train", flags=f"--config={first_preset()}")
    for path in (
        *("/", "/run/runs/a", "/remove?run=runs/a", "/branch?run=runs/a", "/chat"),
        *("/data", "/data?file=embedded", train, train.replace("train", "plans", 1)),
        *(
            "/evaluate?flags=--run=runs/a",
            "/sweeps?flags=--axis=lora.rank=1,2",
            "/queue",
            "/deploy",
        ),
    ):
        page = client.get(path)
        assert page.status_code == 200, path
        for wrong in ('"post"', "/act/", "data-upload"):
            assert wrong not in page.text, path
    form = {"run": "runs/a", "tags": "x", "notes": ""}
    assert client.post("/act/notes", data=form).status_code == 403
    for path in ("/flags/train", "/flags/evaluate", "/flags/sweeps"):
        assert client.get(path, params={"pasted": ""}).status_code in (303, 400)
    assert site.client().post("/act/notes", data=form).status_code == 303


def test_every_answer_forbids_other_scripts_and_frames(site):
    client = site.client()
    for path in ("/", "/absent", "/static/studio.css"):
        policy = client.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy


def test_a_page_holds_no_script_or_style_of_its_own(site):
    """The policy would block them, so they would be missed by nobody but users."""
    make_run(site.runs / "a", "finished")
    make_run(site.runs / "b", "failed")
    client = site.client()
    paths = ("/", "/run/runs/a", "/compare?run=runs/a&run=runs/b", "/queue")
    for path in (*paths, "/remove?run=runs/a", "/branch?run=runs/a", "/absent"):
        text = client.get(path).text
        assert "<style" not in text and " style=" not in text and "onclick" not in text
        assert all("src=" in x[:30] for x in text.split("<script ")[1:]), path


@pytest.mark.parametrize(
    "name",
    [
        "runs/../../etc", "runs/..", "../runs/a", "runs//a", "/etc/passwd", "runs/a\0b",
        "elsewhere/a", "", "runs/link", "runs/link/inner", "runs/./a", "~/a",
    ],
)  # fmt: skip
def test_no_path_leads_out_of_the_roots(site, tmp_path, name):
    make_run(site.runs / "a")
    make_run(tmp_path / "outside" / "inner")
    (site.runs / "link").symlink_to(tmp_path / "outside")
    client = site.client(accept="application/json")
    for answer in (
        client.get("/api/curves", params={"run": name}),
        client.get("/remove", params={"run": name}),
        client.post("/act/trash", data={"run": name}),
    ):
        assert answer.status_code in (403, 404), answer.text
        assert "error" in answer.json()
    assert (tmp_path / "outside" / "inner" / "config.json").exists()
    assert "inner" not in client.get("/api/runs").text


def test_a_new_path_stays_below_the_roots_too(tmp_path):
    roots = Roots([str(tmp_path / "runs"), str(tmp_path / "other" / "runs")], "--runs")
    assert [*roots.folders] == ["runs", "runs-2"]
    (tmp_path / "runs" / "out").symlink_to(tmp_path)
    new = roots.require_inside(tmp_path / "runs" / "new" / "er")
    assert roots.name(new) == "runs/new/er"
    for wrong in ("runs/out/new", "elsewhere", "runs/../new"):
        with pytest.raises(PageError, match="folders"):
            roots.require_inside(tmp_path / wrong)


def test_another_host_needs_keys(tmp_path):
    with pytest.raises(UserError, match="key_file is needed"):
        main(["studio", "--host=0.0.0.0"])


def test_only_its_user_reads_the_token(tmp_path):
    file = tmp_path / "cache" / "studio_token"
    token = make_token(file)
    assert len(token) > 30 and make_token(file) == token
    assert file.stat().st_mode & 0o077 == 0
    with pytest.raises(UserError, match="cannot hold the token"):
        make_token(tmp_path / "cache" / "studio_token" / "below")


def test_one_of_something_is_not_many():
    said = [counted(n, "row") for n in (None, 0, 1, 2, 1000)]
    assert said == ["- rows", "0 rows", "1 row", "2 rows", "1,000 rows"]
