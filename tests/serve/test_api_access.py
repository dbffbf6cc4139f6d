"""Keys, host names and metrics: what a stranger can and cannot do."""

import asyncio
import hashlib
import hmac
import re

import pytest
from starlette.requests import Request

from research.core.errors import UserError
from research.serve.api import guard
from research.serve.api.api_errors import ApiError
from research.serve.api.guard import Guard, read_limited, require_admin
from research.serve.api.prometheus_text import Metric, ServerMetrics
from research.serve.http import access_keys
from research.serve.http.access_keys import ApiKeys, KeyFile

USER, ADMIN = "u" * 20, "a" * 20


@pytest.fixture
def keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n{USER}\n\nadmin {ADMIN}\n")
    file.chmod(0o600)
    return ApiKeys.from_file(file)


def answered(keys=None, hosts=("localhost",), path="/v1/models", **headers):
    """The status, headers and body that a request gets from a `Guard`."""
    sent = []

    async def app(scope, receive, send):
        start = {"type": "http.response.start", "status": 200, "headers": []}
        await send(start)
        await send({"type": "http.response.body", "body": str(scope["role"]).encode()})

    async def send(message):
        sent.append(message)

    raw = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    scope = {"type": "http", "path": path, "headers": raw}
    asyncio.run(Guard(app, keys or ApiKeys(), hosts)(scope, None, send))
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"].decode()


@pytest.mark.parametrize(
    ("header", "role"),
    [
        (f"Bearer {USER}", "user"), (f"bearer {ADMIN}", "admin"), ("", None),
        ("Bearer", None), ("Bearer ", None), (f"Basic {USER}", None), (USER, None),
        (f"Bearer {USER}x", None), (f"Bearer {USER[:-1]}", None),
        (f"Bearer {ADMIN} {USER}", None), ("Bearer \xff\xfe", None),
    ],
)  # fmt: skip
def test_a_key_opens_and_anything_else_does_not(keys, header, role):
    assert keys.role(header.encode("latin-1")) == role


def test_every_guess_is_compared_with_every_key_in_constant_time(keys, monkeypatch):
    compared = []
    real = hmac.compare_digest

    def compare(a, b):
        compared.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr(access_keys.hmac, "compare_digest", compare)
    for guess in (USER, ADMIN, "x", "u" * 19, "y" * 10_000):
        compared.clear()
        keys.role(f"Bearer {guess}".encode())
        assert compared == [(32, 32)] * 2


@pytest.mark.parametrize(
    "text", ["", "short", "# only\n", "two words-of-a-long-key", "\xff"]
)
def test_a_file_without_keys_is_refused(tmp_path, text):
    file = tmp_path / "keys"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="keys"):
        ApiKeys.from_file(file)
    with pytest.raises(UserError, match="cannot be read"):
        ApiKeys.from_file(tmp_path / "absent")


def test_a_key_can_be_known_by_its_digest_alone(tmp_path):
    hashed = f"sha256:{hashlib.sha256(ADMIN.encode()).hexdigest()}"
    keys = ApiKeys.from_text(f"{USER} # of ann, #1\nadmin {hashed}  # of bob", "keys")
    assert keys.role(f"Bearer {USER}".encode()) == "user"
    assert keys.role(f"Bearer {ADMIN}".encode()) == "admin"
    assert keys.role(f"Bearer {hashed}".encode()) is None
    for wrong in (hashed[:-1], hashed.upper().replace("SHA", "sha"), hashed + "0"):
        with pytest.raises(UserError, match="keys:1: sha256: needs 64"):
            ApiKeys.from_text(wrong, "keys")


def test_a_server_follows_its_key_file_and_opens_to_nobody_without_one(tmp_path):
    file = tmp_path / "keys"
    file.write_text(USER)
    keys = KeyFile(file)

    def statuses():
        sent = [f"Bearer {USER}", f"Bearer {ADMIN}", "", "Bearer "]
        return [answered(keys, authorization=x)[0] for x in sent]

    assert statuses() == [200, 401, 401, 401]
    for text, expected in (
        (f"{ADMIN} ", 401), (f"{USER}\n{ADMIN}", 200), ("", 401), (USER, 200),
        ("odd line of words", 401), (None, 401),
    ):  # fmt: skip
        file.unlink() if text is None else file.write_text(text)
        assert statuses()[0] == expected, text
        assert statuses()[2:] == [401, 401]
    assert statuses() == [401] * 4


def test_a_request_without_a_key_reaches_nothing_but_health(keys):
    status, headers, body = answered(keys)
    assert status == 401 and headers[b"www-authenticate"] == b"Bearer"
    assert '"invalid_api_key"' in body
    assert answered(keys, authorization=f"Bearer {USER}")[2] == "user"
    for path in ("/metrics", "/v1/models", "/health/", "//health", "/HEALTH"):
        assert answered(keys, path=path)[0] == 401
    assert answered(keys, path="/health")[2] == "None"


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:8000", "", 200), ("127.0.0.1:1", "", 200), ("[::1]:80", "", 200),
        ("evil.example:8000", "", 403), ("", "", 403), ("localhost.evil", "", 403),
        ("localhost:8000", "http://localhost:8000", 200),
        ("localhost:8000", "http://evil.example", 403), ("localhost:8000", "null", 403),
    ],
)  # fmt: skip
def test_a_page_of_another_origin_reaches_no_server_without_keys(
    keys, host, origin, status
):
    own = {"host": host} | ({"origin": origin} if origin else {})
    assert answered(**own)[0] == status
    # A key is in no page, and a socket file has no host.
    assert answered(keys, authorization=f"Bearer {USER}", **own)[0] == 200
    assert answered(hosts=(), **own)[0] == 200


def test_an_id_of_the_client_comes_back_unless_it_is_odd():
    for given in ("abc-1", "x y", "a\r\nb", "", "y" * 65):
        found = answered(host="localhost", x_request_id=given)[1][b"x-request-id"]
        assert found == given.encode() or (given != "abc-1" and len(found) == 16)
    assert (
        answered(host="localhost", x_request_id="abc-1")[1][b"x-request-id"] == b"abc-1"
    )


def test_only_an_admin_changes_adapters():
    with pytest.raises(ApiError) as caught:
        require_admin(Request({"type": "http", "role": "user"}))
    assert caught.value.status == 403
    require_admin(Request({"type": "http", "role": "admin"}))


class Body:
    """A request whose body comes in chunks."""

    def __init__(self, *chunks):
        self.chunks, self.read = chunks, 0

    async def stream(self):
        for chunk in self.chunks:
            self.read += 1
            yield chunk


def test_a_body_is_read_up_to_its_limit(monkeypatch):
    assert asyncio.run(read_limited(Body(b"ab", b"cd"), 4)) == b"abcd"
    with pytest.raises(ApiError) as caught:
        asyncio.run(read_limited(Body(b"abc", b"de"), 4))
    assert caught.value.status == 413
    monkeypatch.setattr(guard, "DRAINED", 10)
    endless = Body(*[b"xxxx"] * 1000)
    with pytest.raises(ApiError):
        asyncio.run(read_limited(endless, 4))
    assert endless.read < 10


def test_a_body_that_does_not_come_is_given_up(monkeypatch):
    class Stuck:
        async def stream(self):
            yield b"{"
            await asyncio.sleep(60)

    monkeypatch.setattr(guard, "BODY_TIME", 0.01)
    with pytest.raises(ApiError, match="took over") as caught:
        asyncio.run(read_limited(Stuck(), 4))
    # Its rest would be read as the next request.
    response = caught.value.response()
    assert (response.status_code, response.headers["connection"]) == (408, "close")


def test_metrics_are_written_as_prometheus_reads_them():
    metrics = ServerMetrics()
    metrics.running.set(3)
    metrics.generated.add(5, model_name='a"b\\c\nd')
    for value in (0.01, 0.3, 1000):
        metrics.first_token.add(value, model_name="m")
    lines = metrics.text().splitlines()
    assert "research:num_requests_running 3" in lines
    assert r'research:generation_tokens_total{model_name="a\"b\\c\nd"} 5' in lines
    name = "research:time_to_first_token_seconds"
    counts = {
        re.search('le="(.*?)"', line)[1]: int(line.split()[-1])
        for line in lines
        if line.startswith(f"{name}_bucket")
    }
    assert (counts["0.01"], counts["0.25"], counts["0.5"], counts["+Inf"]) == (
        1,
        1,
        2,
        3,
    )
    assert f'{name}_count{{model_name="m"}} 3' in lines
    assert f'{name}_sum{{model_name="m"}} 1000.31' in lines
    for line in lines:
        assert re.fullmatch(r"# (HELP|TYPE) .*|research:\w+(\{.*\})? [\d.e+-]+", line)


def test_a_cleared_metric_has_no_values():
    metric = Metric("x", "gauge", "X.")
    metric.set(1, a="b")
    metric.clear()
    assert len([*metric.lines()]) == 2
