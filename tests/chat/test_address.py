"""Who can reach the chat page, and how from elsewhere."""

import os
import socket

import pytest

import demo
from lavin.runtime.errors import UsageError, UserError
from util.chat.address import check_address, notice, without_proxy

AUTH = ("me", "a:secret")


@pytest.mark.parametrize("name", ["127.0.0.1", "127.0.0.5", "localhost", "::1", "[::1]"])
def test_this_machine_alone_needs_no_password(name):
    if ":" in name and not socket.has_ipv6:
        pytest.skip("no IPv6")
    check_address(name, None, None)
    assert notice(name, 7860) is None


@pytest.mark.parametrize("name", ["0.0.0.0", "::", "8.8.8.8"])
def test_the_network_needs_a_password(name):
    with pytest.raises(UserError, match=r"set --auth USER:PASSWORD, or leave --server_name out and come through ssh -L "
                                        r"7870:127.0.0.1:7870 ") as caught:
        check_address(name, 7870, None)
    assert "\n" not in str(caught.value)


def test_the_notice_shows_the_tunnel(monkeypatch):
    check_address("0.0.0.0", None, AUTH)
    node = socket.gethostname()
    monkeypatch.delenv("SLURM_SUBMIT_HOST", raising=False)
    assert f"ssh -L 7861:{node}:7861 LOGIN" in notice("0.0.0.0", 7861) and "not encrypted" in notice("0.0.0.0", 7861)
    monkeypatch.setenv("SLURM_SUBMIT_HOST", "login3")
    assert "ssh -L 7861:10.0.0.7:7861 login3," in notice("10.0.0.7", 7861)


@pytest.mark.parametrize("name", ["8.8.8.8", "nosuch.invalid", "a b", "http://127.0.0.1", "127.0.0.1:7860", "é" * 300,
                                  "*", "..", "\0"])
def test_other_names_are_refused_in_one_line(name):
    with pytest.raises(UserError, match="^--server_name ") as caught:
        check_address(name, None, AUTH)
    assert len(str(caught.value).splitlines()) == 1


def test_a_port_in_use_is_said_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("util.chat.command.load_chatbot", lambda args: pytest.fail("loaded"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        with pytest.raises(UserError, match=f"^--port {port} is in use"):
            demo.main(demo.get_args_parser().parse_args(["--server_port", port, "--device", "cpu"]))


@pytest.mark.parametrize("text", ["secret", ":secret", "me:", "", ":"])
def test_wrong_credentials_are_not_repeated(text):
    with pytest.raises(UsageError, match="^--auth takes USER:PASSWORD") as caught:
        demo.get_args_parser().parse_args(["--auth", text])
    assert "secret" not in str(caught.value)


def test_a_password_may_hold_colons():
    assert demo.get_args_parser().parse_args(["--auth", "me:a:secret"]).auth == AUTH


def test_proxies_are_back_afterwards(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "here")
    monkeypatch.delenv("no_proxy", raising=False)
    with without_proxy():
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "*"
    assert os.environ["NO_PROXY"] == "here" and "no_proxy" not in os.environ
