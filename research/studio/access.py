"""Who may come in: the token of the printed address, then a cookie.

A page in the browser of the user could send requests to a server on the same machine:
directly, or under a name of its own that leads there (DNS rebinding). So `Host` must be
a name of this server (or its address as a number, to which no name of another site can
lead), whatever changes something must come from a page of this server
(`Origin`), and the cookie is sent to nobody else (`SameSite=Strict`).
"""

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import socket
import urllib.parse
from collections.abc import Iterable, Mapping
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from research.core.atomic_files import make_folder
from research.core.errors import UserError
from research.serve.http.access_keys import ApiKeys, Role
from research.serve.http.sockets import LOOPBACK
from research.studio.page_errors import PageError

TOKEN = "token"  # The field of the printed address.
COOKIE = "research_studio"
KEPT = 30 * 24 * 3600  # seconds that a browser keeps the cookie
OPEN_PATHS = "/static/"  # Files of this repository; the page of a refusal needs them.
READS = ("GET", "HEAD")
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    # Without a referrer, browsers send a form with the origin "null".
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def make_token(file: Path) -> str:
    """The token of this user, the same at each start: a tab stays open over a restart.

    Raises:
      UserError: the file that keeps it cannot be used.
    """
    try:
        make_folder(file.parent)
        if not file.is_file():
            with open(file, "x", opener=_private) as made:
                made.write(secrets.token_urlsafe(24))
        return file.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot hold the token of the studio: {error}; give the right to "
            "write it, or use --key-file"
        ) from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class Access:
    """ASGI middleware. `scope["role"]` and `scope["who"]` say who sent a request."""

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys,
        host: str,
        names: Iterable[str],
        answer_error: object,
    ):
        """
        Args:
          app: what is behind.
          keys: of which a client must have one.
          host: the address that the server listens on. `Host` must be a name of the
            loopback; for another address, this machine's name or any IP address.
          names: more names that `Host` may be, such as that of a proxy.
          answer_error: `(scope, PageError) -> response`, an ASGI app.
        """
        self.app, self.keys, self._answer = app, keys, answer_error
        self._hosts = {"localhost", "127.0.0.1", "[::1]", *names}
        self._is_public = host not in LOOPBACK
        if self._is_public:
            self._hosts |= {host.lower(), socket.gethostname().lower()}
        self._sessions = {_session(digest): role for digest, role in keys.digests}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")
        headers = Headers(scope=scope)

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    answer.setdefault(name, value)
            await send(message)

        given = urllib.parse.parse_qs(scope["query_string"].decode("latin-1"))
        token = given.get(TOKEN, [""])[0]
        scope["role"] = role = self._role(headers)
        client = scope.get("client") or ("unknown", 0)
        scope["who"] = f"{client[0]} ({role or 'nobody'})"
        refusal = self._refusal(scope, headers, role, token)
        if refusal:
            answer = self._answer(scope, refusal)
        elif token and scope["method"] in READS:
            answer = self._admit(scope, headers, token)
        else:
            answer = self.app
        await answer(scope, receive, send_safely)

    def _is_own_name(self, host: str) -> bool:
        """Whether the header `Host` is a name of this server, with any port or none."""
        found = HOST.fullmatch(host)
        if found is None or found[1] in self._hosts:
            return found is not None
        return self._is_public and _is_address(found[1])

    def _role(self, headers: Headers) -> Role | None:
        if "authorization" in headers:
            return self.keys.role(headers["authorization"].encode("latin-1"))
        given = _cookies(headers.getlist("cookie")).get(_cookie_name(headers), "")
        role = None
        for session, allowed in self._sessions.items():
            if hmac.compare_digest(session.encode(), given.encode()):
                role = allowed
        return role

    def _refusal(
        self, scope: Scope, headers: Headers, role: Role | None, token: str
    ) -> PageError | None:
        host = headers.get("host", "").lower()
        if not self._is_own_name(host):
            return PageError(
                403,
                f"the header Host is {host[:80]!r}, which is no name of this server: "
                "use the address that it printed, or start it with --name=NAME",
            )
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        is_own = origin is None or origin.lower().partition("://")[2] == host
        changes = scope["method"] not in READS
        if not is_own or (changes and site not in (None, "same-origin", "none")):
            return PageError(403, "pages of other origins may not send requests here")
        if scope["path"].startswith(OPEN_PATHS):
            return None
        if token and scope["method"] in READS:
            role = role or self.keys.role(b"Bearer " + token.encode())
        if role is None:
            return PageError(
                401,
                "the token is missing or wrong: open the address that the studio has "
                "printed where it was started",
            )
        if changes and role != "admin":
            return PageError(
                403,
                "this key may look and not change anything; a line `admin KEY` in the "
                "key file gives one that may",
            )
        return None

    def _admit(self, scope: Scope, headers: Headers, token: str) -> ASGIApp:
        """Leads to the address without its token, which the cookie replaces."""
        digest = hashlib.sha256(token.encode()).digest()
        fields = urllib.parse.parse_qsl(scope["query_string"].decode("latin-1"))
        rest = urllib.parse.urlencode([(k, v) for k, v in fields if k != TOKEN])
        path = urllib.parse.quote(scope["path"]).replace("//", "/")
        answer = RedirectResponse(path + (f"?{rest}" if rest else ""), 303)
        answer.set_cookie(
            _cookie_name(headers),
            _session(digest),
            max_age=KEPT,
            httponly=True,
            samesite="strict",
            path="/",
        )
        return answer


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return False


def _session(digest: bytes) -> str:
    """A cookie's value, from which no key can be learnt; the same after a restart."""
    return hmac.new(digest, b"research.studio", hashlib.sha256).hexdigest()


def _cookie_name(headers: Mapping[str, str]) -> str:
    """Browsers send a cookie to every port of a host, so its name has the port."""
    port = headers.get("host", "").rpartition(":")[2]
    return f"{COOKIE}_{port}" if port.isdigit() else COOKIE


def _cookies(headers: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in headers:
        for part in text.split(";"):
            name, _, value = part.strip().partition("=")
            found[name] = value
    return found
