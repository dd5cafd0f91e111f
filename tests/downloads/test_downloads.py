"""Downloads of checkpoints: one scripted server signs URLs, another has the files."""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import inspect
import io
import logging
import os
import sys
import tarfile
import threading
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest
from servers.profiles import ProfiledServer
from support.clocks import ManualClock
from support.disks import no_room
from support.hub import FakeHub
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer

from tinkex import RestClient, ServiceClient, TrainingClient
from tinkex._api import archives
from tinkex._downloads import checkpoints, downloads, extraction
from tinkex._downloads.download_folder import INSIDE
from tinkex._transport.request import Reply
from tinkex._transport.transport import Transport
from tinkex.config import Config
from tinkex.errors import (
    APIConnectionError,
    APITimeoutError,
    ClientClosedError,
    ConfigError,
    DownloadCancelledError,
    InternalServerError,
    InvalidInputError,
    NotFoundError,
    PermissionDeniedError,
    ResponseDecodeError,
    RouteMissingError,
)
from tinkex.futures import APIFuture
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.retry import RetryPolicy

KEY = "tml-secret-key"
PATH = "tinker://run-1/weights/final"
ARCHIVE = "GET /api/v1/training_runs/run-1/checkpoints/weights/final/archive"
EXTERNAL = "tinker://run-1/external_weights/out"
URLS = "GET /api/v1/training_runs/run-1/checkpoints/external_weights/out/external_weights_urls"

FILES = {
    "adapter_config.json": b'{"base_model_name_or_path": "base/model", "r": 8}',
    "adapter_model.safetensors": bytes(range(256)) * 9000,  # several chunks
    "sub/empty": b"",
}


def tar_of(files: Dict[str, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


TAR = tar_of(FILES)


def contents(folder: Path) -> Dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class Storage:
    """A file host that serves ranges like object stores, at ``/<name>?signature=<n>``."""

    def __init__(self, server: ScriptedServer) -> None:
        self.server = server
        self.bodies: Dict[str, bytes] = {}
        self.etags: Dict[str, str] = {}
        self.headers: Dict[str, str] = {}
        self.ignores_ranges = False

    def put(self, name: str, body: bytes, etag: Optional[str] = '"v1"', *first: Any) -> None:
        """Serve *body* at *name*, after the answers *first*."""
        self.bodies[f"/{name}"] = body
        if etag is not None:
            self.etags[f"/{name}"] = etag
        self.server.on(f"GET /{name}", *first, self.answer)

    def url(self, name: str, signature: int = 1) -> str:
        return f"{self.server.url}/{name}?signature={signature}"

    def answer(self, received: Received) -> Answer:
        path = received.path.partition("?")[0]
        body, etag = self.bodies[path], self.etags.get(path)
        headers = {**self.headers, **({"ETag": etag} if etag else {})}
        wanted = received.headers.get("range")
        if not wanted or self.ignores_ranges or received.headers.get("if-range") != etag:
            return Answer(200, body, headers, "application/octet-stream")
        start = int(wanted[len("bytes=") : -1])
        if start >= len(body):
            headers["Content-Range"] = f"bytes */{len(body)}"
            return Answer(416, b"", headers)
        headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return Answer(206, body[start:], headers, "application/octet-stream")

    def cut(self, name: str, after: int, **how: Any) -> Answer:
        """Return an answer with the complete file that breaks off *after* this many bytes."""
        headers = {**self.headers, "ETag": self.etags.get(f"/{name}", '"v1"')}
        return Answer(200, self.bodies.get(f"/{name}", TAR), headers, cut_after=after, **how)

    def ranges(self, name: str) -> List[Optional[str]]:
        return [r.headers.get("range") for r in self.server.requests(f"GET /{name}")]


@pytest.fixture
def storage() -> Iterator[Storage]:
    with ScriptedServer() as host:
        yield Storage(host)
        for received in host.requests():
            assert KEY not in str(received.headers)
            assert "x-api-key" not in received.headers


@pytest.fixture
def rest(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[RestClient]:
    """A client without a session, which retries immediately."""
    monkeypatch.setattr(downloads, "RetryPolicy", functools.partial(RetryPolicy, base_s=0.002))
    monkeypatch.setattr(archives, "BUILDING_PAUSE_S", 0.002)
    with RestClient(base_url=server.url, api_key=KEY, max_outage_s=2.0) as client:
        yield client


@pytest.fixture
def archived(server: ScriptedServer, storage: Storage) -> Storage:
    """A server that has the archive of PATH."""
    server.on(ARCHIVE, Answer(302, headers={"Location": storage.url("a.tar")}))
    storage.put("a.tar", TAR)
    return storage


def part_of(dest: Path) -> Path:
    return dest.with_name(f".{dest.name}.part")


# Complete downloads


def test_an_archive_is_fetched_and_unpacked(
    rest: RestClient, archived: Storage, tmp_path: Path
) -> None:
    reported: List[Any] = []
    dest = tmp_path / "new" / "folder"
    found = rest.download_checkpoint(PATH, dest, progress=lambda *step: reported.append(step))
    assert found == dest
    assert contents(dest) == FILES
    assert os.listdir(dest.parent) == ["folder"]
    assert reported[0] == (0, len(TAR))
    assert reported[-1] == (len(TAR), len(TAR))
    assert [done for done, _ in reported] == sorted(done for done, _ in reported)
    assert archived.ranges("a.tar") == [None]


def test_the_url_may_also_come_in_a_body(
    rest: RestClient, server: ScriptedServer, archived: Storage, tmp_path: Path
) -> None:
    body = {"url": archived.url("a.tar"), "expires": "2099-01-01T00:00:00Z"}
    server.on(ARCHIVE, Answer(body=body))
    rest.download_checkpoint(PATH, tmp_path / "x")
    assert contents(tmp_path / "x") == FILES


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_archive(
    rest: RestClient, archived: Storage, tmp_path: Path, mode: str
) -> None:
    archived.put("a.tar", tar_of(FILES, mode))
    rest.download_checkpoint(PATH, tmp_path / "x")
    assert contents(tmp_path / "x") == FILES


def test_exported_files_are_fetched_one_by_one(
    rest: RestClient, server: ScriptedServer, storage: Storage, tmp_path: Path
) -> None:
    for name, body in FILES.items():
        storage.put(name, body)
    urls = {name: storage.url(name) for name in FILES}
    server.on(URLS, Answer(body={"urls": urls, "expires": "2099-01-01T00:00:00Z"}))
    reported: List[Any] = []
    rest.download_checkpoint(
        EXTERNAL, tmp_path / "x", progress=lambda done, total: reported.append((done, total))
    )
    assert contents(tmp_path / "x") == FILES
    assert reported[-1] == (sum(map(len, FILES.values())), None)
    assert len(server.requests(URLS)) == 1


def test_a_redirect_of_the_host_is_followed(
    rest: RestClient, server: ScriptedServer, archived: Storage, tmp_path: Path
) -> None:
    archived.server.on("GET /old.tar", Answer(307, headers={"Location": "/a.tar?signature=2"}))
    archived.put("a.tar", TAR)
    server.on(ARCHIVE, Answer(302, headers={"Location": archived.url("old.tar")}))
    rest.download_checkpoint(PATH, tmp_path / "x")
    assert contents(tmp_path / "x") == FILES


# Going on


def test_a_download_resumes_where_the_connection_broke(
    rest: RestClient, archived: Storage, tmp_path: Path
) -> None:
    archived.put("a.tar", TAR, '"v1"', archived.cut("a.tar", 655_360), archived.answer)
    rest.download_checkpoint(PATH, tmp_path / "x")
    assert contents(tmp_path / "x") == FILES
    first, second = archived.server.requests("GET /a.tar")
    assert "range" not in first.headers
    assert second.headers["range"] == "bytes=655360-"
    assert second.headers["if-range"] == '"v1"'


def test_a_cancelled_download_resumes_in_the_next_call(
    rest: RestClient, archived: Storage, tmp_path: Path
) -> None:
    cancel, arrived = threading.Event(), threading.Event()
    silence = archived.cut("a.tar", 655_360, hold=threading.Event())  # never set
    archived.put("a.tar", TAR, '"v1"', silence, archived.answer)

    def stop_when_all_has_come() -> None:
        assert arrived.wait(PATIENCE_S)
        cancel.set()

    stopper = threading.Thread(target=stop_when_all_has_come)
    stopper.start()

    def progress(done: int, total: Optional[int]) -> None:
        if done == 655_360:
            arrived.set()

    dest = tmp_path / "x"
    with pytest.raises(DownloadCancelledError) as caught:
        rest.download_checkpoint(PATH, dest, progress=progress, cancel=cancel)
    stopper.join()
    assert str(part_of(dest)) in str(caught.value)
    assert not dest.exists()
    assert os.listdir(tmp_path) == [".x.part"]
    assert (part_of(dest) / "archive").read_bytes() == TAR[:655_360]
    assert not (part_of(dest) / "files").exists()

    reported: List[int] = []
    rest.download_checkpoint(PATH, dest, progress=lambda done, total: reported.append(done))
    assert reported[0] == 655_360
    assert contents(dest) == FILES
    assert os.listdir(tmp_path) == ["x"]
    assert archived.ranges("a.tar") == [None, "bytes=655360-"]


def test_ctrl_c_keeps_the_bytes_received_so_far(
    rest: RestClient, archived: Storage, tmp_path: Path
) -> None:
    def interrupt(done: int, total: Optional[int]) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rest.download_checkpoint(PATH, tmp_path / "x", progress=interrupt)
    assert os.listdir(tmp_path) == [".x.part"]
    kept = (part_of(tmp_path / "x") / "archive").stat().st_size
    assert 0 < kept < len(TAR)
    rest.download_checkpoint(PATH, tmp_path / "x")
    assert contents(tmp_path / "x") == FILES
    assert archived.ranges("a.tar") == [None, f"bytes={kept}-"]


def test_closing_the_client_ends_a_download(
    rest: RestClient, archived: Storage, tmp_path: Path
) -> None:
    silence = archived.cut("a.tar", 65_536, hold=threading.Event())
    archived.put("a.tar", TAR, '"v1"', silence)
    closer = threading.Thread(target=rest.close)

    def progress(done: int, total: Optional[int]) -> None:
        if done == 65_536:
            closer.start()

    with pytest.raises(ClientClosedError):
        rest.download_checkpoint(PATH, tmp_path / "x", progress=progress)
    closer.join()


def interrupted(rest: RestClient, dest: Path, path: str = PATH) -> int:
    """Interrupt a download; return how many bytes it has stored."""

    def stop(done: int, total: Optional[int]) -> None:
        if done:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        rest.download_checkpoint(path, dest, progress=stop)
    return (part_of(dest) / "archive").stat().st_size


def test_a_changed_file_is_fetched_from_the_start(
    rest: RestClient, archived: Storage, tmp_path: Path
) -> None:
    interrupted(rest, tmp_path / "x")
    archived.put("a.tar", tar_of({"other": b"x" * 500_000}), '"v2"')
    rest.download_checkpoint(PATH, tmp_path / "x")
    assert contents(tmp_path / "x") == {"other": b"x" * 500_000}


def test_a_host_that_ignores_ranges(rest: RestClient, archived: Storage, tmp_path: Path) -> None:
    interrupted(rest, tmp_path / "x")
    archived.ignores_ranges = True
    rest.download_checkpoint(PATH, tmp_path / "x")
    assert contents(tmp_path / "x") == FILES


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_etag_a_download_starts_over(
    rest: RestClient, archived: Storage, tmp_path: Path, etag: Optional[str]
) -> None:
    archived.etags.clear()
    archived.put("a.tar", TAR, etag)
    interrupted(rest, tmp_path / "x")
    rest.download_checkpoint(PATH, tmp_path / "x")
    assert archived.ranges("a.tar") == [None, None]
    assert contents(tmp_path / "x") == FILES


def test_a_complete_file_is_not_fetched_again(
    rest: RestClient, archived: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **how: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "extract", full)
    with pytest.raises(OSError, match="No space"):
        rest.download_checkpoint(PATH, tmp_path / "x")
    monkeypatch.undo()
    rest.download_checkpoint(PATH, tmp_path / "x")
    assert archived.ranges("a.tar") == [None, f"bytes={len(TAR)}-"]
    assert contents(tmp_path / "x") == FILES


@pytest.mark.parametrize(
    "answer",
    [
        Answer(416, b"", {"Content-Range": "bytes */5"}),
        Answer(206, b"xx", {"Content-Range": "bytes 3-4/5"}),
        Answer(206, b"xx", {}),
        Answer(206, b"xx", {"Content-Range": "bytes 65536-65537/65538"}),
    ],
    ids=["416 of another size", "206 from elsewhere", "206 of anything", "206 of another size"],
)
def test_a_wrong_range_starts_the_file_over(
    rest: RestClient, archived: Storage, tmp_path: Path, answer: Answer
) -> None:
    assert interrupted(rest, tmp_path / "x") == 65536
    archived.put("a.tar", TAR, '"v1"', answer)
    rest.download_checkpoint(PATH, tmp_path / "x")
    assert archived.ranges("a.tar") == [None, "bytes=65536-", None]
    assert contents(tmp_path / "x") == FILES


def test_a_host_that_never_sends_the_right_range_fails_the_download(
    rest: RestClient, archived: Storage, tmp_path: Path
) -> None:
    partial = Answer(206, b"xx", {"Content-Range": "bytes 3-4/5"})
    archived.put("a.tar", TAR, '"v1"', *[archived.cut("a.tar", 100), partial] * 9)
    with pytest.raises(ResponseDecodeError, match="ranges"):
        rest.download_checkpoint(PATH, tmp_path / "x")


def test_another_checkpoint_does_not_resume_from_this_one(
    rest: RestClient, server: ScriptedServer, archived: Storage, tmp_path: Path
) -> None:
    interrupted(rest, tmp_path / "x")
    server.on(
        ARCHIVE.replace("final", "other"), Answer(302, headers={"Location": archived.url("b.tar")})
    )
    archived.put("b.tar", tar_of({"b": b"b"}))
    rest.download_checkpoint(PATH.replace("final", "other"), tmp_path / "x")
    assert contents(tmp_path / "x") == {"b": b"b"}
    assert archived.ranges("b.tar") == [None]


# Signatures, outages


def test_a_refused_url_is_signed_again(
    rest: RestClient, server: ScriptedServer, archived: Storage, tmp_path: Path
) -> None:
    refused = Answer(403, b"<Error><Code>AccessDenied</Code></Error>")
    cut = archived.cut("a.tar", 300_000)
    archived.put("a.tar", TAR, '"v1"', cut, refused, archived.answer)
    server.on(
        ARCHIVE,
        *[Answer(302, headers={"Location": archived.url("a.tar", n)}) for n in (1, 2)],
    )
    rest.download_checkpoint(PATH, tmp_path / "x")
    assert contents(tmp_path / "x") == FILES
    assert [r.path for r in archived.server.requests()] == [
        "/a.tar?signature=1",
        "/a.tar?signature=1",
        "/a.tar?signature=2",
    ]
    assert archived.ranges("a.tar") == [None, "bytes=300000-", "bytes=300000-"]


def test_a_host_that_always_refuses_fails_the_download(
    rest: RestClient, server: ScriptedServer, archived: Storage, tmp_path: Path
) -> None:
    archived.put("a.tar", TAR, '"v1"', *[Answer(403, b"no")] * 9)
    with pytest.raises(PermissionDeniedError) as caught:
        rest.download_checkpoint(PATH, tmp_path / "x")
    assert len(server.requests(ARCHIVE)) == 3
    assert "signature" not in str(caught.value)


def test_a_url_about_to_expire_is_signed_again_before_its_next_use(
    rest: RestClient, server: ScriptedServer, archived: Storage, tmp_path: Path
) -> None:
    soon = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=60), usegmt=True)
    archived.put("a.tar", TAR, '"v1"', archived.cut("a.tar", 1000), archived.answer)
    later = {"Location": archived.url("a.tar", 2), "Expires": "Fri, 01 Jan 2100 00:00:00 GMT"}
    server.on(
        ARCHIVE,
        Answer(302, headers={"Location": archived.url("a.tar", 1), "Expires": soon}),
        Answer(302, headers=later),
    )
    rest.download_checkpoint(PATH, tmp_path / "x")
    assert [r.path[-1] for r in archived.server.requests()] == ["1", "2"]


def test_each_file_of_an_export_is_fetched_with_a_fresh_url(
    rest: RestClient, server: ScriptedServer, storage: Storage, tmp_path: Path
) -> None:
    for name, body in FILES.items():
        storage.put(name, body)

    def sign(received: Received) -> Answer:
        number = len(server.requests(URLS))
        soon = (datetime.now(timezone.utc) + timedelta(seconds=60)).isoformat()
        expires = soon if number == 1 else "2099-01-01T00:00:00Z"
        urls = {name: storage.url(name, number) for name in FILES}
        return Answer(body={"urls": urls, "expires": expires})

    server.on(URLS, sign)
    rest.download_checkpoint(EXTERNAL, tmp_path / "x")
    assert contents(tmp_path / "x") == FILES
    assert len(server.requests(URLS)) == 2
    assert {r.path[-1] for r in storage.server.requests()} == {"2"}


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_temporary_trouble_of_the_host_is_retried(
    rest: RestClient, archived: Storage, tmp_path: Path, status: int
) -> None:
    trouble = Answer(status, b"", {"Retry-After": "0.001"})
    archived.put("a.tar", TAR, '"v1"', trouble, trouble, archived.answer)
    rest.download_checkpoint(PATH, tmp_path / "x")
    assert contents(tmp_path / "x") == FILES


def test_a_long_outage_is_an_error_without_the_signature(
    rest: RestClient, server: ScriptedServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "tinkex")
    with ScriptedServer() as gone:
        url = f"{gone.url}/a.tar?X-Signature=abc"
    server.on(ARCHIVE, Answer(302, headers={"Location": url}))
    with RestClient(base_url=server.url, max_outage_s=0.05) as impatient:
        with pytest.raises(APIConnectionError, match=r"127\.0\.0\.1") as caught:
            impatient.download_checkpoint(PATH, tmp_path / "x")
    assert "refused" in str(caught.value)
    chain: List[str] = []
    error: Optional[BaseException] = caught.value
    while error is not None:
        chain.append(str(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert "abc" not in " ".join(chain)
    assert "abc" not in caplog.text


@pytest.mark.parametrize("url", ["file:///etc/passwd", "s3://bucket/key", "/no/host", "//"])
def test_only_web_addresses_are_fetched(
    rest: RestClient, server: ScriptedServer, tmp_path: Path, url: str
) -> None:
    server.on(ARCHIVE, Answer(body={"url": url}))
    with pytest.raises(ResponseDecodeError, match="URL"):
        rest.download_checkpoint(PATH, tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_an_untrusted_host_is_reported_immediately(
    rest: RestClient, server: ScriptedServer, tmp_path: Path
) -> None:
    with ScriptedServer(tls=True) as host:
        server.on(ARCHIVE, Answer(body={"url": f"{host.url}/a.tar?signature=1"}))
        with pytest.raises(APIConnectionError, match="certificate") as caught:
            rest.download_checkpoint(PATH, tmp_path / "x")
    assert not caught.value.retryable
    assert "signature" not in str(caught.value)


def test_a_4xx_of_the_host_is_final(rest: RestClient, archived: Storage, tmp_path: Path) -> None:
    archived.put("a.tar", TAR, '"v1"', Answer(451, b""))
    with pytest.raises(Exception, match="responded 451 to the download of tinker://run-1"):
        rest.download_checkpoint(PATH, tmp_path / "x")
    assert len(archived.server.requests()) == 1


def test_an_announced_digest_is_checked(
    rest: RestClient, archived: Storage, tmp_path: Path
) -> None:
    right = base64.b64encode(hashlib.sha256(TAR).digest()).decode()
    archived.headers = {"Repr-Digest": f"sha-256=:{right}:"}
    rest.download_checkpoint(PATH, tmp_path / "x")
    assert contents(tmp_path / "x") == FILES
    wrong = base64.b64encode(hashlib.sha256(b"").digest()).decode()
    archived.headers = {"x-amz-checksum-sha256": wrong}
    with pytest.raises(ResponseDecodeError, match="SHA-256"):
        rest.download_checkpoint(PATH, tmp_path / "y")
    assert not (part_of(tmp_path / "y") / "archive").exists()


# The archive's own route


def test_the_client_waits_for_a_server_that_builds_the_archive(
    rest: RestClient, server: ScriptedServer, archived: Storage, tmp_path: Path
) -> None:
    building = Answer(503, {"detail": "building"})
    ready = Answer(302, headers={"Location": archived.url("a.tar")})
    server.on(ARCHIVE, *[building] * 5, ready)
    rest.download_checkpoint(PATH, tmp_path / "x")
    assert len(server.requests(ARCHIVE)) == 6


def test_retry_after_decides_how_long_the_client_waits_for_the_archive(
    rest: RestClient, server: ScriptedServer
) -> None:
    server.on(
        ARCHIVE,
        Answer(503, headers={"Retry-After": "7"}),
        Answer(503),
        Answer(body={"url": "https://host/x"}),
    )
    pauses: List[float] = []
    found = archives.get_checkpoint_archive_url(
        rest.transport, "run-1", "weights/final", pause=pauses.append
    )
    assert found.url == "https://host/x"
    assert pauses == [7.0, archives.BUILDING_PAUSE_S]


def test_a_server_that_never_finishes_the_archive_fails_the_download(
    rest: RestClient, server: ScriptedServer
) -> None:
    server.on(ARCHIVE, Answer(503, {"detail": "still building"}))
    with pytest.raises(InternalServerError, match="still building"):
        rest.get_checkpoint_archive_url_from_tinker_path(PATH).result(PATIENCE_S)
    assert len(server.requests(ARCHIVE)) == archives.BUILDING_TRIES


def test_the_client_waits_as_long_for_a_server_that_builds_the_archive_in_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each request alone outlasts ``max_outage_s``."""
    clock = ManualClock()
    config = Config("http://a.test")
    transport = Transport(config, clock=clock)

    def send_once(*args: Any, **how: Any) -> Reply:
        clock.advance(config.poll_timeout_s)
        raise APITimeoutError("no response in time")

    monkeypatch.setattr(transport, "send_once", send_once)
    pauses: List[float] = []
    with pytest.raises(APITimeoutError) as caught:
        archives.get_checkpoint_archive_url(
            transport, "run-1", "weights/final", pause=pauses.append
        )
    assert pauses == [archives.BUILDING_PAUSE_S] * (archives.BUILDING_TRIES - 1)
    assert caught.value.attempts == archives.BUILDING_TRIES


class JustInTime(APIFuture[str]):
    """A future that is settled between the end of a wait and the next check."""

    def result(self, timeout: Optional[float] = None) -> str:
        if not self.done():
            self.try_set_result("saved")
            raise FutureTimeoutError
        return super().result(timeout)


def test_an_export_that_finishes_at_the_end_of_a_wait_is_not_a_timeout() -> None:
    nothing: Any = None
    download = checkpoints._Download(nothing, nothing, nothing, nothing, nothing)
    assert download._wait(JustInTime("save_weights_external")) == "saved"


def test_cancelling_interrupts_the_wait_for_the_archive(
    rest: RestClient, server: ScriptedServer, tmp_path: Path
) -> None:
    cancel = threading.Event()
    server.on(ARCHIVE, Answer(hold=threading.Event()))

    def stop() -> None:
        server.wait_for(ARCHIVE)
        cancel.set()

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(DownloadCancelledError):
        rest.download_checkpoint(PATH, tmp_path / "x", cancel=cancel)
    stopper.join()


def test_the_archive_url_can_be_requested_alone(rest: RestClient, server: ScriptedServer) -> None:
    headers = {"Location": "/files/a.tar?s=1", "Expires": "Fri, 01 Jan 2100 00:00:00 GMT"}
    server.on(ARCHIVE, Answer(302, headers=headers))
    found = rest.get_checkpoint_archive_url("run-1", "weights/final").result(PATIENCE_S)
    assert found.url == f"{server.url}/files/a.tar?s=1"
    assert found.expires == datetime(2100, 1, 1, tzinfo=timezone.utc)
    asked = [r.path for r in server.requests()]
    assert asked[-1] == ARCHIVE.partition(" ")[2], "and the redirect is not followed"


def test_a_missing_checkpoint_is_not_a_missing_route(
    rest: RestClient, server: ScriptedServer, tmp_path: Path
) -> None:
    server.on(ARCHIVE, Answer(404, {"detail": "no checkpoint weights/final"}))
    with pytest.raises(NotFoundError, match="weights/final"):
        rest.download_checkpoint(PATH, tmp_path / "x")


def test_a_sampler_checkpoint_needs_a_server_with_archives(
    rest: RestClient, server: ScriptedServer, tmp_path: Path
) -> None:
    path = "tinker://run-1/sampler_weights/final"
    route = ARCHIVE.replace("/weights/", "/sampler_weights/")
    server.on(route, Answer(404, {"detail": "Not Found"}))
    with pytest.raises(RouteMissingError, match="archive") as caught:
        rest.download_checkpoint(path, tmp_path / "x")
    assert "save_state" in str(caught.value)
    assert os.listdir(tmp_path) == []


# Where it goes


def test_existing_files_are_not_overwritten_unless_requested(
    rest: RestClient, archived: Storage, tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("keep me")
    with pytest.raises(InvalidInputError, match="overwrite=True"):
        rest.download_checkpoint(PATH, tmp_path / "x")
    assert archived.server.requests() == []
    rest.download_checkpoint(PATH, tmp_path / "x", overwrite=True)
    assert contents(tmp_path / "x") == {**FILES, "mine": b"keep me"}
    assert os.listdir(tmp_path) == ["x"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with files that come from no checkpoint."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    (folder / "data" / "rows.csv").write_text("1,2")
    return folder


MINE = {"thesis.txt": b"years of work", "data/rows.csv": b"1,2"}


def test_overwriting_the_working_directory_keeps_all_other_files(
    rest: RestClient, archived: Storage, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    with pytest.raises(InvalidInputError, match="keeps the others"):
        rest.download_checkpoint(PATH, ".")
    for _ in range(2):
        rest.download_checkpoint(PATH, ".", overwrite=True)
        assert contents(project) == {**FILES, **MINE}
        assert os.path.samefile(".", project)
        assert not (project / INSIDE).exists()


def test_overwriting_leaves_no_file_of_another_adapter(
    rest: RestClient, archived: Storage, project: Path
) -> None:
    (project / "adapter_config.json").write_text("{}")
    (project / "adapter_model.bin").write_text("of another checkpoint")
    rest.download_checkpoint(PATH, project, overwrite=True)
    assert contents(project) == {**FILES, **MINE}


def test_an_interrupted_download_into_a_folder_resumes_in_it(
    rest: RestClient, archived: Storage, project: Path
) -> None:
    def stop(done: int, total: Optional[int]) -> None:
        if done:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        rest.download_checkpoint(PATH, project, overwrite=True, progress=stop)
    assert (project / INSIDE / "archive").stat().st_size == 65_536
    assert os.listdir(project.parent) == ["project"]
    rest.download_checkpoint(PATH, project, overwrite=True)
    assert archived.ranges("a.tar") == [None, "bytes=65536-"]
    assert contents(project) == {**FILES, **MINE}


def test_a_failed_overwrite_changes_nothing(
    rest: RestClient, archived: Storage, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "adapter_config.json").write_text("old")
    (project / "adapter_model.safetensors").write_text("old")
    before = contents(project)
    replace = os.replace

    def full(source: Any, sink: Any) -> None:
        if Path(sink).parent == project / "sub":
            raise OSError(28, "No space left on device")
        replace(source, sink)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        rest.download_checkpoint(PATH, project, overwrite=True)
    monkeypatch.undo()
    left = {name: body for name, body in contents(project).items() if INSIDE not in name}
    assert left == before
    rest.download_checkpoint(PATH, project, overwrite=True)
    assert contents(project) == {**FILES, **MINE}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "link to a file", "broken link"])
def test_a_file_is_never_replaced_by_a_checkpoint(
    rest: RestClient, archived: Storage, project: Path, kind: str, overwrite: bool
) -> None:
    dest = project / "thesis.txt"
    if kind != "file":
        dest = project / "link"
        dest.symlink_to("thesis.txt" if kind == "link to a file" else "nothing")
    with pytest.raises(InvalidInputError, match="is not a folder"):
        rest.download_checkpoint(PATH, dest, overwrite=overwrite)
    assert archived.server.requests() == []
    assert (project / "thesis.txt").read_text() == "years of work"
    assert kind == "file" or dest.is_symlink()


@pytest.mark.parametrize("name", ["sub", "sub/empty/inside"])
def test_a_folder_is_not_replaced_by_a_file_nor_a_file_by_a_folder(
    rest: RestClient, archived: Storage, project: Path, name: str
) -> None:
    (project / name).parent.mkdir(parents=True, exist_ok=True)
    (project / name).write_text("mine")
    with pytest.raises(InvalidInputError, match="Nothing was changed"):
        rest.download_checkpoint(PATH, project, overwrite=True)
    left = {name: body for name, body in contents(project).items() if INSIDE not in name}
    assert left == {**MINE, name: b"mine"}


def test_a_hidden_folder_that_is_not_from_a_download_is_left_alone(
    rest: RestClient, archived: Storage, tmp_path: Path
) -> None:
    part_of(tmp_path / "x").mkdir()
    (part_of(tmp_path / "x") / "mine").write_text("keep me")
    with pytest.raises(InvalidInputError, match="not from a download"):
        rest.download_checkpoint(PATH, tmp_path / "x")
    assert contents(tmp_path) == {".x.part/mine": b"keep me"}


def test_existing_files_stay_until_the_download_is_complete(
    rest: RestClient, archived: Storage, tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("keep me")
    archived.put("a.tar", b"this is no archive")
    with pytest.raises(ResponseDecodeError):
        rest.download_checkpoint(PATH, tmp_path / "x", overwrite=True)
    assert (tmp_path / "x" / "mine").read_text() == "keep me"


def test_an_empty_folder_is_accepted_as_the_destination(
    rest: RestClient, archived: Storage, tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    rest.download_checkpoint(PATH, str(tmp_path / "x"))
    assert contents(tmp_path / "x") == FILES


# Unpacking


def hostile(**facts: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo("good")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"good"))
        member = tarfile.TarInfo("bad")
        for name, value in facts.items():
            setattr(member, name, value)
        tar.addfile(member, io.BytesIO(b"x" * member.size))
    return out.getvalue()


def damaged(archive: bytes, at: int) -> bytes:
    """Return *archive* with the byte at *at* inverted."""
    changed = bytearray(archive)
    changed[at] ^= 0xFF
    return bytes(changed)


HOSTILE = {
    "absolute": hostile(name="/tmp/evil", size=1),
    "upward": hostile(name="../evil", size=1),
    "upward inside": hostile(name="a/../../evil", size=1),
    "drive": hostile(name="C:/evil", size=1),
    "backslash": hostile(name="..\\evil", size=1),
    "control character": hostile(name="a\nb", size=1),
    "symlink": hostile(name="link", type=tarfile.SYMTYPE, linkname="/etc"),
    "hard link": hostile(name="link", type=tarfile.LNKTYPE, linkname="../../etc/passwd"),
    "fifo": hostile(name="pipe", type=tarfile.FIFOTYPE),
    "device": hostile(name="null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    "twice": hostile(name="good", size=1),
    "file as folder": hostile(name="good/inside", size=1),
    "no tar": b"PK\x03\x04 not a tar",
    "cut": TAR[: len(TAR) // 2],
    "cut gzip": tar_of(FILES, "w:gz")[:-30],
    "empty": b"",
    "zeros": bytes(12 * 1024),
    "gzip of zeros": gzip.compress(bytes(12 * 1024)),
    "no files": tar_of({}),
    "empty files": tar_of(dict.fromkeys(FILES, b"")),
    "no weights": tar_of({"adapter_config.json": b"{}", "README.md": b"hello"}),
    "empty weights": tar_of({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}),
    "cut before a file": tar_of({"a": bytes(512), "b": b"b"})[:1024],
    "cut in a header": tar_of({"a": bytes(512), "b": b"b"})[:1300],
    "a header overwritten": damaged(tar_of({"a": bytes(512), "b": b"b"}), 1024 + 100),
    "bytes after the gzip": tar_of(FILES, "w:gz") + b"x",
    "gzip cut before its checksum": tar_of(FILES, "w:gz")[:-8],
    "gzip with another checksum": damaged(tar_of(FILES, "w:gz"), -6),
    "gzip with a byte flipped": damaged(gzip.compress(TAR, compresslevel=0), len(TAR) // 2),
    "bzip2 with a byte flipped": damaged(tar_of(FILES, "w:bz2"), -2),
    "xz with a byte flipped": damaged(tar_of(FILES, "w:xz"), -20),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_damaged_or_malicious_archive_is_refused(
    rest: RestClient, archived: Storage, tmp_path: Path, what: str
) -> None:
    archived.put("a.tar", HOSTILE[what])
    inner = tmp_path / "inner"
    inner.mkdir()
    with pytest.raises(ResponseDecodeError):
        rest.download_checkpoint(PATH, inner / "x")
    assert os.listdir(tmp_path) == ["inner"]
    assert os.listdir(inner) == [], "neither its files nor the archive itself stay"


def safetensors(missing: int = 0) -> bytes:
    """Return a file of one tensor, without its last *missing* bytes."""
    header = b'{"w": {"dtype": "U8", "shape": [1000], "data_offsets": [0, 1000]}}'
    return len(header).to_bytes(8, "little") + header + bytes(1000 - missing)


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        (safetensors(missing=1), "has 1073 bytes, and should have 1074"),
        (safetensors() + b"x", "has 1075 bytes, and should have 1074"),
        (safetensors()[:20], "should have unknown"),
        (bytes(5000), "begins with zeros"),
    ],
    ids=["cut", "too long", "cut in its header", "zeros"],
)
def test_incomplete_weights_are_refused_from_any_source(
    rest: RestClient,
    server: ScriptedServer,
    archived: Storage,
    tmp_path: Path,
    weights: bytes,
    why: str,
) -> None:
    name = "adapter_model.safetensors"
    archived.put("a.tar", tar_of({**FILES, name: weights}))
    archived.put(name, weights)
    server.on(URLS, Answer(body={"urls": {name: archived.url(name)}}))
    for path in (PATH, EXTERNAL):
        with pytest.raises(ResponseDecodeError, match=why):
            rest.download_checkpoint(path, tmp_path / "x")
        assert os.listdir(tmp_path) == []


def test_complete_and_encrypted_weights_are_accepted(
    rest: RestClient, archived: Storage, tmp_path: Path
) -> None:
    name = "adapter_model.safetensors"
    for number, weights in enumerate((safetensors(), b"age-encryption.org/v1\n...")):
        archived.put("a.tar", tar_of({**FILES, name: weights}))
        rest.download_checkpoint(PATH, tmp_path / str(number))
        assert contents(tmp_path / str(number))[name] == weights


def test_data_after_the_end_of_an_archive_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "SLACK_BYTES", 1000)
    bomb = tmp_path / "bomb.tar.gz"
    bomb.write_bytes(gzip.compress(tar_of({"a": b"a"}) + bytes(3_000_000)))
    with pytest.raises(ResponseDecodeError, match="follow the end"):
        extraction.extract(bomb, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_archive_unpacks_to_a_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "SLACK_BYTES", 1000)
    bomb = tmp_path / "bomb.tar.gz"
    bomb.write_bytes(tar_of({"zeros": bytes(3_000_000)}, "w:gz"))
    with pytest.raises(ResponseDecodeError, match="unpacks to more"):
        extraction.extract(bomb, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_archive_has_a_bounded_number_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "MAX_FILES", 3)
    many = tmp_path / "many.tar"
    many.write_bytes(tar_of({str(n): b"" for n in range(4)}))
    with pytest.raises(ResponseDecodeError, match="more than 3 files"):
        extraction.extract(many, tmp_path / "out")


def test_files_are_created_with_plain_permissions(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    archive.write_bytes(hostile(name="setuid", size=1, mode=0o6777, uid=0))
    extraction.extract(archive, tmp_path / "out")
    assert (tmp_path / "out" / "setuid").stat().st_mode & 0o7000 == 0


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../b", "", "."])
def test_the_names_of_exported_files_are_checked_too(
    rest: RestClient, server: ScriptedServer, storage: Storage, tmp_path: Path, name: str
) -> None:
    server.on(URLS, Answer(body={"urls": {name: storage.url("x")}}))
    with pytest.raises(ResponseDecodeError, match="not a file name"):
        rest.download_checkpoint(EXTERNAL, tmp_path / "x")
    assert storage.server.requests() == []


# The embedded server


@pytest.fixture
def saved(trainer: TrainingClient) -> str:
    return trainer.save_state("final").result(PATIENCE_S).path


def test_checkpoints_of_the_embedded_server_can_be_downloaded(
    service: ServiceClient, trainer: TrainingClient, saved: str, tmp_path: Path
) -> None:
    rest = service.create_rest_client()
    rest.download_checkpoint(saved, tmp_path / "weights")
    sampler = trainer.save_weights_for_sampler("s").result(PATIENCE_S).path
    assert sampler is not None
    rest.download_checkpoint(sampler, tmp_path / "sampler")
    exported = trainer.save_weights_external("e").result(PATIENCE_S).path
    reported: List[int] = []
    rest.download_checkpoint(
        exported, tmp_path / "external", progress=lambda done, total: reported.append(done)
    )
    for name in ("weights", "sampler", "external"):
        assert list(contents(tmp_path / name)) == ["deterministic.json"]
    assert reported[-1] == sum(len(body) for body in contents(tmp_path / "external").values())
    trainer.save_state("after").result(PATIENCE_S)  # the session continues


def test_a_download_from_the_embedded_server_resumes_too(
    service: ServiceClient, saved: str, tmp_path: Path
) -> None:
    rest = service.create_rest_client()
    sizes: List[int] = []
    rest.download_checkpoint(saved, tmp_path / "whole", progress=lambda done, _: sizes.append(done))
    complete, size = contents(tmp_path / "whole"), sizes[-1]
    done_before = interrupted(rest, tmp_path / "x", saved)
    reported: List[int] = []
    rest.download_checkpoint(saved, tmp_path / "x", progress=lambda done, _: reported.append(done))
    assert reported == ([] if done_before == size else [done_before, size])
    assert contents(tmp_path / "x") == complete


def test_a_download_on_a_full_disk_leaves_nothing_and_can_be_repeated(
    service: ServiceClient, saved: str, tmp_path: Path
) -> None:
    rest = service.create_rest_client()
    with no_room(), pytest.raises(OSError, match="too large"):
        rest.download_checkpoint(saved, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    rest.download_checkpoint(saved, tmp_path / "x")
    assert list(contents(tmp_path / "x")) == ["deterministic.json"]


@pytest.mark.parametrize("profile", ["skyrl-0.3", "tuft-0.2"])
def test_checkpoints_of_other_servers_can_be_downloaded(profile: str, tmp_path: Path) -> None:
    key = None if profile.startswith("skyrl") else KEY
    engine = DeterministicEngine(vocab_size=1000, context_length=64)
    with ProfiledServer(engine, profile=profile, api_key=key) as local:
        with ServiceClient(base_url=local.url, api_key=key) as service:
            trainer = service.create_lora_training_client("deterministic", rank=4)
            saved = trainer.save_state("final").result(PATIENCE_S).path
            sampler = trainer.save_weights_for_sampler("s").result(PATIENCE_S).path
        with RestClient(base_url=local.url, api_key=key) as rest:
            if profile == "skyrl-0.3":  # it offers archives of sampler checkpoints only
                with pytest.raises(RouteMissingError):
                    rest.download_checkpoint(saved, tmp_path / "training")
                assert not (tmp_path / "training").exists()
            else:
                rest.download_checkpoint(saved, tmp_path / "training")
                assert list(contents(tmp_path / "training")) == ["deterministic.json"]
            rest.download_checkpoint(str(sampler), tmp_path / "sampler")
            assert list(contents(tmp_path / "sampler")) == ["deterministic.json"]


def test_without_archives_a_training_checkpoint_is_exported_and_downloaded(
    tmp_path: Path,
) -> None:
    engine = DeterministicEngine(vocab_size=1000, context_length=64)
    with ProfiledServer(engine, profile="hosted", api_key=KEY) as local:
        with ServiceClient(base_url=local.url, api_key=KEY) as service:
            trainer = service.create_lora_training_client("deterministic", rank=4)
            path = trainer.save_state("final").result(PATIENCE_S).path
            sampler = trainer.save_weights_for_sampler("s").result(PATIENCE_S).path
        with RestClient(base_url=local.url, api_key=KEY) as rest:
            before = rest.list_user_checkpoints().result(PATIENCE_S).checkpoints
            with pytest.raises(RouteMissingError, match="archive"):
                rest.download_checkpoint(str(sampler), tmp_path / "s")
            rest.download_checkpoint(path, tmp_path / "x")
            after = rest.list_user_checkpoints().result(PATIENCE_S).checkpoints
            sessions = rest.list_sessions().result(PATIENCE_S).sessions
    assert list(contents(tmp_path / "x")) == ["deterministic.json"]
    assert after == before, "the export is deleted again"
    assert len(sessions) == 2, "one is for the export"
    assert os.listdir(tmp_path) == ["x"]


# The hub


@pytest.fixture
def pushable(archived: Storage, server: ScriptedServer) -> None:
    info = {"base_model": "base/model", "is_lora": True, "lora_rank": 32}
    server.on("POST /api/v1/weights_info", Answer(body=info))


def test_a_checkpoint_is_pushed_with_a_model_card(rest: RestClient, pushable: None) -> None:
    hub = FakeHub()
    assert rest.push_to_hub(PATH, "me/model", hub=hub) == "https://hub/commit/1"
    card = hub.files.pop("README.md").decode()
    assert hub.files == FILES
    assert card.startswith('---\nbase_model: "base/model"\nlibrary_name: peft\n')
    assert "rank 32" in card
    assert PATH in card
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder"]
    assert hub.calls[0][1] == {"repo_id": "me/model", "private": True, "exist_ok": True}
    upload = hub.calls[1][1]
    assert upload["repo_id"] == "me/model"
    assert PATH in upload["commit_message"]
    assert not Path(upload["folder_path"]).exists()


def test_an_existing_model_card_is_kept_and_none_is_written_unasked(
    rest: RestClient, archived: Storage, pushable: None
) -> None:
    hub = FakeHub()
    rest.push_to_hub(PATH, "me/model", hub=hub, add_model_card=False)
    assert "README.md" not in hub.files
    archived.put("a.tar", tar_of({**FILES, "README.md": b"mine"}))
    rest.push_to_hub(PATH, "me/model", hub=hub)
    assert hub.files["README.md"] == b"mine"


def test_the_model_card_takes_its_facts_from_the_files_if_the_server_reports_none(
    rest: RestClient, server: ScriptedServer, pushable: None
) -> None:
    server.on("POST /api/v1/weights_info", Answer(404, {"detail": "Not Found"}))
    hub = FakeHub()
    rest.push_to_hub(PATH, "me/model", hub=hub)
    card = hub.files["README.md"].decode()
    assert "rank 8 over `base/model`" in card


def test_a_pull_request_instead_of_a_push(rest: RestClient, pushable: None) -> None:
    hub = FakeHub()
    url = rest.push_to_hub(
        PATH, "me/model", hub=hub, create_pr=True, revision="v1", allow_patterns=["*.json"]
    )
    assert url == "https://hub/pull/1"
    assert hub.calls[1] == (
        "create_branch",
        {"repo_id": "me/model", "branch": "v1", "exist_ok": True},
    )
    upload = hub.calls[2][1]
    assert (upload["create_pr"], upload["revision"]) == (True, "v1")
    assert (upload["allow_patterns"], upload["ignore_patterns"]) == (["*.json"], None)


def test_an_error_of_the_hub_is_passed_on_and_no_file_is_left(
    rest: RestClient, pushable: None
) -> None:
    hub = FakeHub()
    hub.trouble = OSError("the hub is down")
    with pytest.raises(OSError, match="the hub is down"):
        rest.push_to_hub(PATH, "me/model", hub=hub)
    assert not Path(hub.calls[-1][1]["folder_path"]).exists()


def test_without_huggingface_hub_the_error_names_what_to_install(
    rest: RestClient, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="huggingface_hub") as caught:
        rest.push_to_hub(PATH, "me/model")
    assert "tinkex[hub]" in str(caught.value)
    assert server.requests() == []


def test_the_fake_hub_accepts_the_arguments_of_the_real_one() -> None:
    hub = pytest.importorskip("huggingface_hub")
    for name in ("create_repo", "create_branch", "upload_folder"):
        real = set(inspect.signature(getattr(hub.HfApi, name)).parameters)
        used = {
            "create_repo": {"repo_id", "private", "exist_ok"},
            "create_branch": {"repo_id", "branch", "exist_ok"},
            "upload_folder": {
                "repo_id",
                "folder_path",
                "revision",
                "commit_message",
                "create_pr",
                "allow_patterns",
                "ignore_patterns",
            },
        }[name]
        assert used <= real


@pytest.mark.parametrize("repo_id", ["", "/", None])
def test_a_repository_needs_a_name(rest: RestClient, server: ScriptedServer, repo_id: Any) -> None:
    with pytest.raises(InvalidInputError, match="repo_id"):
        rest.push_to_hub(PATH, repo_id, hub=FakeHub())
    assert server.requests() == []
