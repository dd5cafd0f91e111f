"""Config: every setting, resolved once."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Dict

import numpy as np
import pytest

import tinkex
from tinkex.config import DEFAULT_BASE_URL, Config
from tinkex.errors import ConfigError, InvalidInputError, TinkexError

KEY = "tml-secret-4711"


@pytest.fixture(autouse=True)
def no_proxy_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def resolve(environ: Any = (), **settings: Any) -> Config:
    return Config.resolve(environ=dict(environ), **settings)


def test_defaults_are_the_hosted_service_without_a_key() -> None:
    config = resolve()
    assert config.base_url == DEFAULT_BASE_URL
    assert config.api_key is None
    assert config.tags == ()
    assert config.wire == "auto"


def test_the_environment_supplies_missing_settings() -> None:
    config = resolve(
        {
            "TINKER_BASE_URL": "http://server:8080/prefix/",
            "TINKER_API_KEY": KEY,
            "TINKER_PROJECT_ID": "p1",
            "TINKER_TAGS": "a, b,,c ",
            "SSL_CERT_FILE": "/certificates.pem",
        }
    )
    assert config.base_url == "http://server:8080/prefix"
    assert config.api_key == KEY
    assert config.project_id == "p1"
    assert config.tags == ("a", "b", "c")
    assert config.ca_bundle == "/certificates.pem"


def test_keywords_win_over_the_environment_and_none_counts_as_missing() -> None:
    environ = {"TINKER_BASE_URL": "http://env", "TINKER_API_KEY": "env", "TINKER_TAGS": "env"}
    config = resolve(environ, base_url="http://given", api_key="given", tags=["given"])
    assert (config.base_url, config.api_key, config.tags) == ("http://given", "given", ("given",))
    config = resolve(environ, base_url=None, api_key=None, tags=None)
    assert (config.base_url, config.api_key, config.tags) == ("http://env", "env", ("env",))


def test_empty_variables_count_as_unset() -> None:
    config = resolve({"TINKER_BASE_URL": "", "TINKER_API_KEY": "", "TINKER_PROJECT_ID": ""})
    assert config == resolve()


def test_a_config_is_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", "before")
    monkeypatch.setenv("https_proxy", "http://before:3128")
    headers, metadata = {"X-A": "1"}, {"k": "v"}
    config = Config.resolve(base_url="https://h", extra_headers=headers, user_metadata=metadata)
    monkeypatch.setenv("TINKER_API_KEY", "after")
    monkeypatch.setenv("https_proxy", "http://after:3128")
    headers["X-A"] = "2"
    metadata["k"] = "w"
    assert config.api_key == "before"
    assert config.proxy == "http://before:3128"
    assert config.extra_headers == {"X-A": "1"}
    assert config.user_metadata == {"k": "v"}


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve().api_key = "x"  # type: ignore[misc]  # what is tested


def test_an_unknown_setting_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting: tiemout_s") as caught:
        resolve(tiemout_s=3)
    assert "read_timeout_s" in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("base_url", "localhost:8080"),
        ("base_url", "ftp://host"),
        ("base_url", "http://"),
        ("base_url", "http://host:port"),
        ("base_url", "http://host:99999"),
        ("base_url", "http://[::1"),
        ("base_url", 8080),
        ("wire", "xml"),
        ("on_billing", "ignore"),
        ("read_timeout_s", 0),
        ("read_timeout_s", -1.0),
        ("read_timeout_s", math.inf),
        ("read_timeout_s", math.nan),
        ("max_outage_s", "300"),
        ("operation_timeout_s", 0.0),
        ("max_concurrent_samples", 0),
        ("max_concurrent_samples", 2.5),
        ("max_concurrent_samples", "many"),
        ("max_heartbeat_failures", 0),
        ("api_key", "two\nlines"),
        ("api_key", "caf\u2014"),
        ("extra_headers", {"X-A": "a\r\nX-B: b"}),
        ("extra_headers", {"X-A": 3}),
        ("extra_headers", {"X-A\n": "b"}),
        ("extra_headers", {"": "X-A"}),
        ("extra_headers", {3: "X-A"}),
    ],
)
def test_a_bad_value_is_a_config_error_that_names_it(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(**{setting: value})
    named = {"api_key": "API key", "extra_headers": "header"}.get(setting, setting)
    assert named in str(caught.value)


def test_a_newline_at_the_end_of_a_key_is_removed() -> None:
    assert resolve(api_key=f"{KEY}\n").api_key == KEY
    assert resolve({"TINKER_API_KEY": f" {KEY}\r\n"}).api_key == KEY


def test_the_key_is_in_no_repr_and_no_error() -> None:
    config = resolve(api_key=KEY, extra_headers={"X-Secret": KEY}, proxy=f"http://me:{KEY}@proxy")
    assert KEY not in repr(config)
    assert KEY not in config.key_digest
    with pytest.raises(ConfigError) as caught:
        resolve(api_key=f"{KEY}\x00")
    assert KEY not in repr(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("base_url", "hint"),
    [
        ("localhost:8080", "http://localhost:8080 or https://localhost:8080."),
        ("host.example/prefix", "http://host.example/prefix or"),
        ("http://host:99999", "a port is from 1 to 65535"),
        ("me:hunter2@host", "the server's address"),
    ],
)
def test_the_error_about_a_wrong_base_url_suggests_the_right_one(base_url: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(base_url=base_url)
    assert hint in str(caught.value.hint)
    assert "hunter2" not in str(caught.value)


def test_a_password_in_the_url_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(base_url="https://me:hunter2@host")
    assert "hunter2" not in str(caught.value)


def test_key_digests_distinguish_keys() -> None:
    digests = {resolve(api_key=key).key_digest for key in (None, "a", "b")}
    assert len(digests) == 3


PROXY = "http://proxy:3128"


@pytest.mark.parametrize(
    ("variables", "base_url", "expected"),
    [
        ({"https_proxy": PROXY}, "https://host", PROXY),
        ({"https_proxy": PROXY}, "http://host", None),
        ({"HTTP_PROXY": PROXY}, "http://host", PROXY),
        ({"all_proxy": PROXY}, "https://host", PROXY),
        ({"https_proxy": PROXY, "no_proxy": "host"}, "https://host", None),
        ({"https_proxy": PROXY, "no_proxy": ".corp,other"}, "https://a.corp", None),
        ({"https_proxy": PROXY, "no_proxy": "host:8443"}, "https://host:8443", None),
        ({"https_proxy": PROXY, "no_proxy": "host:8443"}, "https://host:9443", PROXY),
        ({"https_proxy": PROXY, "no_proxy": "*"}, "https://host", None),
        ({"http_proxy": PROXY}, "http://localhost:8080", None),
        ({"http_proxy": PROXY}, "http://127.0.0.1:8080", None),
        ({"http_proxy": PROXY}, "http://[::1]:8080", None),
    ],
)
def test_the_proxy_is_taken_from_the_environment(
    variables: Dict[str, str], base_url: str, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Config.resolve(base_url=base_url).proxy == expected


def test_a_given_proxy_wins() -> None:
    assert resolve(base_url="http://127.0.0.1:1", proxy=PROXY).proxy == PROXY


def test_ca_variables_are_read_in_order() -> None:
    environ = {"CURL_CA_BUNDLE": "/curl", "SSL_CERT_FILE": "/ssl"}
    assert resolve(environ, base_url="http://h").ca_bundle == "/curl"
    environ["REQUESTS_CA_BUNDLE"] = "/requests"
    assert resolve(environ, base_url="http://h").ca_bundle == "/requests"
    assert resolve(environ, base_url="http://h", ca_bundle="/given").ca_bundle == "/given"


def test_a_missing_ca_bundle_is_named_if_it_would_be_used(tmp_path: Any) -> None:
    missing = str(tmp_path / "ca.pem")
    with pytest.raises(ConfigError, match=r"ca\.pem"):
        resolve(base_url="https://h", ca_bundle=missing)
    (tmp_path / "ca.pem").write_text("")
    assert resolve(base_url="https://h", ca_bundle=missing).ca_bundle == missing


@pytest.mark.parametrize(
    ("base_url", "expected"),
    [
        ("http://host", "host:80"),
        ("https://host/prefix", "host:443"),
        ("http://host:8080/a/b", "host:8080"),
    ],
)
def test_host_and_port_are_explicit(base_url: str, expected: str) -> None:
    assert resolve(base_url=base_url).host_and_port == expected


def test_tags_may_be_given_as_one_string() -> None:
    assert resolve(tags="a, b").tags == ("a", "b")


# ---- Settings as people have them ----


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("Http://Host", "http://host"),
        ("HTTPS://HOST.example:8443/Prefix/", "https://host.example:8443/Prefix"),
        ("http://host:/", "http://host"),
        (" http://host/a b/\n", "http://host/a%20b"),
        ("http://host/caf\u00e9", "http://host/caf%C3%A9"),
        ("http://host/a%20b/100%", "http://host/a%20b/100%25"),
        ("http://b\u00fccher.example", "http://xn--bcher-kva.example"),
        ("http://[FE80::1%25eth0]:80/x", "http://[fe80::1%25eth0]:80/x"),
        ("http://my_host.", "http://my_host."),
    ],
)
def test_a_base_url_is_stored_in_the_form_that_requests_use(given: str, used: str) -> None:
    config = resolve(base_url=given)
    assert config.base_url == used
    assert Config(used).base_url == Config(given).base_url == used
    assert dataclasses.replace(config, quiet=True).base_url == used


@pytest.mark.parametrize(
    "base_url",
    [
        "http://my host",
        "http://ho\nst",
        "http://host/a\nb",
        "http://a..b",
        "http://-host",
        "http://" + "a" * 64,
        "http://" + ".".join(["a" * 60] * 5),
        "http://host\\path",
        "http://host:+80",
        "http://host:8 0",
        "http://host?key=1",
        "http://host/path#part",
        "http://ho%73t",
        b"http://host",
    ],
)
def test_a_url_that_no_request_can_be_sent_to_is_refused(base_url: Any) -> None:
    with pytest.raises(ConfigError, match="base_url"):
        resolve(base_url=base_url)


def test_a_password_is_not_shown_even_if_the_url_is_broken() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(base_url="http://me:hunter2@my host")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "used"),
    [("proxy:3128", "http://proxy:3128"), ("HTTP://u:p@Proxy:1", "http://u:p@proxy:1"), ("", None)],
)
def test_a_proxy_may_lack_its_scheme(given: str, used: Any) -> None:
    assert resolve(base_url="https://h", proxy=given).proxy == used


@pytest.mark.parametrize("proxy", ["ftp://proxy", "http://", "http://u:hunter2@my proxy", 3128])
def test_an_invalid_proxy_is_refused_and_not_shown(proxy: Any) -> None:
    with pytest.raises(ConfigError, match="proxy") as caught:
        resolve(base_url="https://h", proxy=proxy)
    assert "hunter2" not in str(caught.value)


def test_a_broken_proxy_of_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://")
    with pytest.raises(ConfigError, match="proxy"):
        resolve(base_url="https://h")
    assert resolve(base_url="http://127.0.0.1:1").proxy is None


def test_a_socks_proxy_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="PySocks"):
        resolve(base_url="https://h", proxy="socks5h://proxy:1080")


def test_the_path_of_a_ca_bundle_may_begin_with_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "ca.pem").write_text("")
    expected = str(tmp_path / "ca.pem")
    assert resolve(base_url="https://h", ca_bundle=Path("~") / "ca.pem").ca_bundle == expected
    assert resolve({"SSL_CERT_FILE": "~/ca.pem"}, base_url="https://h").ca_bundle == expected


def test_a_missing_ca_bundle_is_found_whatever_the_case_of_the_scheme() -> None:
    with pytest.raises(ConfigError, match="CA bundle"):
        resolve(base_url="HTTPS://h", ca_bundle="/nowhere/ca.pem")


def test_settings_may_be_numpy_numbers() -> None:
    config = resolve(
        base_url="http://h",
        read_timeout_s=np.float32(2.5),
        poll_timeout_s=np.int64(100),
        max_unread=np.int64(10),
        max_concurrent_samples=np.array(4.0),
        quiet=np.bool_(True),
    )
    assert (config.read_timeout_s, config.poll_timeout_s) == (2.5, 100)
    assert (config.max_unread, config.max_concurrent_samples, config.quiet) == (10, 4, True)
    assert {type(config.read_timeout_s), type(config.max_concurrent_samples)} == {float, int}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("read_timeout_s", True),
        ("max_unread", True),
        ("quiet", "perhaps"),
        ("api_key", 123),
        ("credential_cmd", ["echo"]),
        ("project_id", 5),
        ("display_name", 5),
        ("ca_bundle", 5),
        ("tags", 5),
        ("tags", ["a", 5]),
        ("user_metadata", "x"),
        ("user_metadata", {"a": 1}),
        ("extra_headers", "x"),
        ("prices", 5),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=setting):
        resolve(**{setting: value})


def test_variables_may_end_with_a_newline() -> None:
    environ = {"TINKER_BASE_URL": "http://h\n", "TINKER_PROJECT_ID": "p1\n"}
    config = resolve(environ)
    assert (config.base_url, config.project_id) == ("http://h", "p1")


@pytest.mark.parametrize("make", [tinkex.ServiceClient, tinkex.RestClient, tinkex.AdminClient])
def test_a_base_url_without_its_keyword_is_refused_with_the_remedy(make: Any) -> None:
    with pytest.raises(TinkexError) as caught:
        make("http://localhost:8080")
    assert "base_url=" in str(caught.value.hint)


@pytest.mark.parametrize("make", [tinkex.ServiceClient, tinkex.RestClient])
def test_a_dict_is_not_accepted_as_a_config(make: Any) -> None:
    with pytest.raises(InvalidInputError, match="config is of type dict"):
        make(config={"base_url": "http://h"})
