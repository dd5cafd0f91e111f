"""Signed URLs, archives and parts of files."""

from __future__ import annotations

import io
import tarfile
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Dict
from urllib.parse import urlsplit

import pytest
import requests
from local.harness import Api, serving

from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.errors import HTTPError
from tinkex.local.http.contents import file_content, tar_content
from tinkex.local.http.signatures import Signer
from tinkex.local.state.store import Store


class Wall:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "adapter"
    (root / "sub").mkdir(parents=True)
    (root / "b.bin").write_bytes(bytes(range(256)) * 2000)
    (root / "a.json").write_text("{}")
    (root / "sub" / "empty").write_bytes(b"")
    return root


def everything(content: Any) -> bytes:
    return b"".join(content.read(0, content.size))


def test_an_archive_contains_the_files_and_nothing_about_the_machine(folder: Path) -> None:
    content = tar_content(folder)
    raw = everything(content)
    content.close()
    assert len(raw) == content.size
    assert len(raw) % tarfile.RECORDSIZE == 0
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        assert archive.getnames() == ["a.json", "b.bin", "sub/empty"]
        for member in archive.getmembers():
            assert (member.mtime, member.uid, member.uname, member.mode) == (0, 0, "", 0o644)
            source = archive.extractfile(member)
            assert source is not None
            assert source.read() == (folder / member.name).read_bytes()


def test_an_archive_has_the_same_bytes_every_time_and_in_every_part(folder: Path) -> None:
    first, second = tar_content(folder), tar_content(folder)
    raw = everything(first)
    (folder / "a.json").touch()
    assert everything(second) == raw
    for start in range(0, len(raw), 50_001):
        assert b"".join(second.read(start, start + 70_000)) == raw[start : start + 70_000]
    assert b"".join(second.read(5, 5)) == b""
    first.close()
    second.close()


def test_a_file_that_shrinks_during_a_download_is_an_error_and_not_a_short_response(
    folder: Path,
) -> None:
    content = file_content(folder, "b.bin")
    (folder / "b.bin").write_bytes(b"x")
    with pytest.raises(OSError, match="shorter"):
        everything(content)
    content.close()


def test_a_deleted_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tar_content(tmp_path / "gone")


def test_a_signature_is_valid_for_one_path_and_one_expiry() -> None:
    wall = Wall()
    signer = Signer(60.0, wall)
    url, expires_at = signer.sign("/signed/a:b/c d")
    parts = urlsplit(url)
    assert parts.path == "/signed/a:b/c%20d"
    assert expires_at == wall.now + 60
    query = dict(pair.split("=") for pair in parts.query.split("&"))
    signer.check("/signed/a:b/c d", query["expires"], query["signature"])
    for path, expires, signature in [
        ("/signed/a:b/other", query["expires"], query["signature"]),
        ("/signed/a:b/c d", str(expires_at + 1), query["signature"]),
        ("/signed/a:b/c d", query["expires"], "0" * 64),
        ("/signed/a:b/c d", query["expires"], "é"),
        ("/signed/a:b/c d", "soon", query["signature"]),
        ("/signed/a:b/c d", "²", query["signature"]),
        ("/signed/a:b/c d", "9" * 5000, query["signature"]),
        ("/signed/a:b/c d", None, query["signature"]),
        ("/signed/a:b/c d", query["expires"], None),
    ]:
        with pytest.raises(HTTPError) as caught:
            signer.check(path, expires, signature)
        assert caught.value.status == 403
    wall.now += 60
    with pytest.raises(HTTPError, match="expired"):
        signer.check("/signed/a:b/c d", query["expires"], query["signature"])


# The routes


def fetch(api: Api, path: str, *, method: str = "GET", **more: Any) -> Any:
    """Fetch *path* completely, so that the server closes its files."""
    return api.client.open(path, method=method, buffered=True, follow_redirects=True, **more)


def archive_url(api: Api, path: str) -> str:
    run_id, kind, name = path[len("tinker://") :].split("/")
    answer = api.client.get(
        f"/api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}/archive",
        headers=KEY,
    )
    assert answer.status_code == 302, answer.text
    location = answer.headers["Location"]
    assert answer.get_json()["url"] == location
    expires = parsedate_to_datetime(answer.headers["Expires"]).timestamp()
    assert f"expires={int(expires)}&" in location
    return str(location)


KEY = {"X-API-Key": "tml-secret"}


def local(url: str) -> str:
    """Return the part of a URL that Flask's test client accepts."""
    parts = urlsplit(url)
    assert (parts.scheme, parts.netloc) == ("http", "localhost")
    return f"{parts.path}?{parts.query}"


def names_in(raw: bytes) -> Dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        found = {}
        for member in archive.getmembers():
            source = archive.extractfile(member)
            assert source is not None
            found[member.name] = source.read()
        return found


def test_the_archive_of_a_checkpoint_is_fetched_without_a_key_until_it_expires(
    tmp_path: Path,
) -> None:
    wall = Wall()
    with serving(tmp_path, store=Store(tmp_path, wall=wall), api_key="tml-secret") as api:
        api.client.environ_base["HTTP_X_API_KEY"] = "tml-secret"
        path = api.save(api.model(), 1, "a")
        url = local(archive_url(api, path))
        del api.client.environ_base["HTTP_X_API_KEY"]
        assert fetch(api, "/api/v1/training_runs").status_code == 401
        answer = fetch(api, url)
        assert answer.status_code == 200
        assert answer.mimetype == "application/x-tar"
        assert list(names_in(answer.data)) == ["deterministic.json"]
        assert answer.headers["Content-Disposition"] == 'attachment; filename="a.tar"'
        assert fetch(api, url, method="HEAD").headers["Content-Length"] == str(len(answer.data))
        assert fetch(api, url.replace("/a?", "/b?")).status_code == 403
        assert fetch(api, url.partition("?")[0]).status_code == 403
        wall.now += 900
        assert "expired" in fetch(api, url).get_json()["detail"]


def test_a_download_resumes_where_it_stopped(api: Api) -> None:
    url = local(archive_url(api, api.save(api.model(), 1, "a")))
    full = fetch(api, url)
    assert full.headers["Accept-Ranges"] == "bytes"
    etag = full.headers["ETag"]
    size = len(full.data)

    def part(asked: str, **headers: str) -> Any:
        return fetch(api, url, headers={"Range": asked, **headers})

    rest = part("bytes=512-", **{"If-Range": etag})
    assert (rest.status_code, rest.data) == (206, full.data[512:])
    assert rest.headers["Content-Range"] == f"bytes 512-{size - 1}/{size}"
    assert rest.headers["ETag"] == etag
    assert part("bytes=0-9").data == full.data[:10]
    assert part("bytes=-7").data == full.data[-7:]
    assert part(f"bytes=5-{size * 2}").data == full.data[5:]
    beyond = part(f"bytes={size}-")
    assert (beyond.status_code, beyond.data) == (416, b"")
    assert beyond.headers["Content-Range"] == f"bytes */{size}"
    for ignored in ("bytes=0-1,4-5", "lines=1-2", "nonsense"):
        assert part(ignored).status_code == 200
    other = part("bytes=512-", **{"If-Range": '"another version"'})
    assert (other.status_code, other.data) == (200, full.data)


def test_a_checkpoint_saved_again_under_its_name_is_another_version(api: Api) -> None:
    model = api.model()
    url = local(archive_url(api, api.save(model, 1, "a")))
    before = fetch(api, url).headers["ETag"]
    assert fetch(api, url).headers["ETag"] == before
    api.result(api.post("save_weights", model_id=model, seq_id=2, path="a", overwrite=True))
    assert fetch(api, url).headers["ETag"] != before


def test_exported_weights_are_fetched_file_by_file(tmp_path: Path) -> None:
    with serving(tmp_path) as api:
        model = api.model()
        made = api.post("save_weights_external", model_id=model, seq_id=1, path="x")
        saved = api.result(made)
        assert saved["path"] == f"tinker://{model}/external_weights/x"
        assert saved["type"] == "save_weights_external"
        checkpoints = f"training_runs/{model}/checkpoints"
        listed = api.get(checkpoints)["checkpoints"]
        assert [one["checkpoint_type"] for one in listed] == ["external"]
        assert saved["size_bytes"] == listed[0]["size_bytes"] > 0
        found = api.get(f"{checkpoints}/external_weights/x/external_weights_urls")
        assert list(found["urls"]) == ["deterministic.json"]
        assert found["expires"].endswith("Z")
        answer = fetch(api, local(found["urls"]["deterministic.json"]))
        assert answer.get_json(force=True)["steps"] == 0
        assert len(answer.data) == saved["size_bytes"]
        api.save(model, 2, "w")
        refused = api.get(f"{checkpoints}/weights/w/external_weights_urls", 400)
        assert "save_weights_external" in refused["detail"]
        api.client.delete(f"/api/v1/{checkpoints}/external_weights/x")
        gone = fetch(api, local(found["urls"]["deterministic.json"]))
        assert gone.status_code == 404
        assert "has no checkpoint" in gone.get_json()["detail"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("training_runs/no/checkpoints/weights/a/archive", 404),
        ("training_runs/no/checkpoints/nonsense/a/archive", 400),
        ("training_runs/no/checkpoints/external_weights/a/external_weights_urls", 404),
    ],
)
def test_a_missing_checkpoint_has_no_url(api: Api, path: str, status: int) -> None:
    assert "detail" in api.get(path, status)


def test_a_signed_path_cannot_leave_its_checkpoint(api: Api) -> None:
    model = api.model()
    api.result(api.post("save_weights_external", model_id=model, seq_id=1, path="x"))
    found = api.get(f"training_runs/{model}/checkpoints/external_weights/x/external_weights_urls")
    url = local(found["urls"]["deterministic.json"])
    for other in ("../../../../tinkex.sqlite3", "..%2f..%2ftinkex.sqlite3", "/etc/passwd"):
        assert fetch(api, url.replace("deterministic.json", other)).status_code in (403, 404)


def test_over_a_socket_an_archive_is_fetched_whole_and_in_parts() -> None:
    with LocalServer(DeterministicEngine(), api_key="tml-secret") as server:
        with requests.Session() as session:
            session.headers.update(KEY)

            def post(route: str, **body: Any) -> Dict[str, Any]:
                answer = session.post(f"{server.url}/api/v1/{route}", json=body, timeout=20)
                assert answer.status_code == 200, answer.text
                return dict(answer.json())

            session_id = post("create_session", tags=[])["session_id"]
            made = post(
                "create_model",
                session_id=session_id,
                model_seq_id=0,
                base_model="deterministic",
            )
            model = post("retrieve_future", request_id=made["request_id"])["model_id"]
            saved = post("save_weights", model_id=model, seq_id=1, path="a")
            post("retrieve_future", request_id=saved["request_id"])
            checkpoint = f"{server.url}/api/v1/training_runs/{model}/checkpoints/weights/a"
            full = session.get(f"{checkpoint}/archive", timeout=20)
            assert [one.status_code for one in full.history] == [302]
            assert list(names_in(full.content)) == ["deterministic.json"]
        parts = []
        with requests.Session() as anybody:
            for start in range(0, len(full.content), 3000):
                asked = {"Range": f"bytes={start}-{start + 2999}"}
                part = anybody.get(full.url, headers=asked, timeout=20)
                assert part.status_code == 206
                parts.append(part.content)
            head = anybody.head(full.url, timeout=20)
            assert int(head.headers["Content-Length"]) == len(full.content)
        assert b"".join(parts) == full.content
