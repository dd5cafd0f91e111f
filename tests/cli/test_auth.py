"""``tinkex auth``: login, status, whoami, logout."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import pytest
from support.scripted_server import Answer, Received, ScriptedServer

from tinkex.cli.main import run_command
from tinkex.credentials import CredentialsFile, StoredKey
from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.settings import ServerSettings

KEY = "tml-secret-4711"
ME = "/api/v1/auth/apikey/me"
CAPABILITIES = "GET /api/v1/get_server_capabilities"


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Put a key on stdin, as a pipe would."""
    stdin = io.StringIO(f" {KEY} \n")
    monkeypatch.setattr("sys.stdin", stdin)
    return stdin


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("TINKER_API_KEY", "TINKER_CREDENTIAL_CMD", "TINKER_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def hosted() -> Iterator[ScriptedServer]:
    """A server that sends the responses that a test scripts."""
    with ScriptedServer() as scripted:
        yield scripted


@pytest.fixture
def tinkex_auth(
    hosted: ScriptedServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """A function that runs ``tinkex auth ...`` against the scripted server."""
    monkeypatch.setenv("TINKER_BASE_URL", hosted.url)

    def run(*arguments: str) -> Ran:
        code = run_command(["auth", *arguments])
        ran = Ran(code, *capsys.readouterr())
        assert KEY not in ran.out + ran.err
        return ran

    return run


def about(received: Received) -> Answer:
    if received.headers["x-api-key"] != KEY:
        return Answer(401, {"detail": "unknown key"})
    details = {"org_details": {"name": "Org"}, "user_details": {"email": "a@b.c"}}
    return Answer(body={"key_id": 7, "name": "laptop", "note": "n", "details": details})


def test_login_checks_the_key_and_stores_it(
    tinkex_auth: Any, hosted: ScriptedServer, typed: io.StringIO
) -> None:
    hosted.on(f"GET {ME}", about)
    ran = tinkex_auth("login")
    assert (ran.code, "laptop" in ran.out) == (0, True)
    (asked,) = hosted.requests()  # the key itself is sent: no request for flags or a token
    assert asked.headers["x-api-key"] == KEY
    content = json.loads(CredentialsFile().path.read_text())
    assert content["default"] == "7"
    assert content["keys"]["7"] == {
        "type": "manual",
        "key": KEY,
        "name": "laptop",
        "note": "n",
        "details": {"org_details": {"name": "Org"}, "user_details": {"email": "a@b.c"}},
    }


def test_a_second_login_is_refused_before_the_key_is_asked_for(
    tinkex_auth: Any, hosted: ScriptedServer, typed: io.StringIO
) -> None:
    CredentialsFile().store_default("1", StoredKey("old", "desktop"))
    ran = tinkex_auth("login")
    assert (ran.code, "desktop" in ran.err, "logout" in ran.err) == (1, True, True)
    assert typed.tell() == 0
    assert hosted.requests() == []


def test_a_refused_key_is_not_stored(
    tinkex_auth: Any, hosted: ScriptedServer, typed: io.StringIO
) -> None:
    hosted.on(f"GET {ME}", Answer(401, {"detail": "unknown key"}))
    ran = tinkex_auth("login")
    assert (ran.code, "unknown key" in ran.err) == (1, True)
    assert not CredentialsFile().path.exists()


@pytest.mark.parametrize("body", [b"[]", b"{}", b"<html>", b'{"key_id": "x"}'])
def test_nonsense_about_a_key_is_an_error(
    tinkex_auth: Any, hosted: ScriptedServer, typed: io.StringIO, body: bytes
) -> None:
    hosted.on(f"GET {ME}", Answer(body=body))
    ran = tinkex_auth("login")
    assert (ran.code, "apikey/me" in ran.err) == (1, True)
    assert not CredentialsFile().path.exists()


def test_a_key_is_checked_in_another_way_if_the_server_has_no_key_information(
    tinkex_auth: Any, hosted: ScriptedServer, typed: io.StringIO
) -> None:
    hosted.on(CAPABILITIES, Answer(body={"supported_models": []}))
    assert tinkex_auth("login").code == 0
    assert hosted.requests(CAPABILITIES)[0].headers["x-api-key"] == KEY
    found = CredentialsFile().default()
    assert found is not None
    assert found.key == KEY


def test_status_says_where_the_key_is_from_and_whether_it_works(
    tinkex_auth: Any, hosted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosted.on(CAPABILITIES, Answer(body={"supported_models": []}))
    CredentialsFile().store_default("1", StoredKey(KEY, "desktop"))
    ran = tinkex_auth("status")
    assert ran.code == 0
    first, second = ran.out.splitlines()
    assert "desktop" in first
    assert second.endswith("yes")
    monkeypatch.setenv("TINKER_CREDENTIAL_CMD", f"echo {KEY}")
    assert "TINKER_CREDENTIAL_CMD" in tinkex_auth("status").out
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    assert "TINKER_API_KEY" in tinkex_auth("status").out
    hosted.on(CAPABILITIES, Answer(403, {"detail": "not you"}))
    ran = tinkex_auth("status")
    assert (ran.code, "not you" in ran.out) == (1, True)


def test_status_without_a_key(tinkex_auth: Any, hosted: ScriptedServer) -> None:
    hosted.on(CAPABILITIES, Answer(401, {"detail": "who are you?"}))
    ran = tinkex_auth("status")
    assert (ran.code, "none" in ran.out.splitlines()[0]) == (1, True)


def test_logout_removes_the_key_and_revokes_one_made_for_this_machine(
    tinkex_auth: Any, hosted: ScriptedServer
) -> None:
    assert tinkex_auth("logout").code == 0  # there is nothing left to do
    CredentialsFile().store_default("1", StoredKey(KEY, "typed in"))
    assert tinkex_auth("logout").code == 0
    assert CredentialsFile().default() is None
    assert hosted.requests() == []
    hosted.on(f"DELETE {ME}", Answer())
    CredentialsFile().store_default("2", StoredKey(KEY, "made", "generated"))
    assert tinkex_auth("logout").code == 0
    assert hosted.requests(f"DELETE {ME}")[0].headers["x-api-key"] == KEY


def test_a_key_that_cannot_be_revoked_is_still_removed_with_a_message(
    tinkex_auth: Any, hosted: ScriptedServer
) -> None:
    hosted.on(f"DELETE {ME}", Answer(503, {"detail": "busy"}))
    CredentialsFile().store_default("2", StoredKey(KEY, "made", "generated"))
    ran = tinkex_auth("logout")
    assert (ran.code, "busy" in ran.err) == (1, True)
    assert CredentialsFile().default() is None


def test_against_the_embedded_server(
    typed: io.StringIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ServerSettings(api_key=KEY, jwt=True, owner_urn="tml:user:me", org_id="us")
    with LocalServer(DeterministicEngine(), settings=settings) as local:
        monkeypatch.setenv("TINKER_BASE_URL", local.url)
        assert run_command(["auth", "login"]) == 0
        assert run_command(["auth", "status"]) == 0
        capsys.readouterr()
        assert run_command(["auth", "whoami", "-f", "json"]) == 0
        assert json.loads(capsys.readouterr().out) == {
            "user_urn": "tml:user:me",
            "org_urn": "tml:organization:us",
            "email": None,
        }
        assert run_command(["auth", "whoami"]) == 0
        assert "tml:user:me" in capsys.readouterr().out
        assert run_command(["run", "list", "-f", "json"]) == 0  # with the stored key
        assert run_command(["auth", "logout"]) == 0
        assert run_command(["run", "list"]) == 1
        assert "401" in capsys.readouterr().err
