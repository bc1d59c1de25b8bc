"""The address of the chat page: who can reach it there, and how it is reached from elsewhere."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Annotated

from pydantic import BeforeValidator

from lavin.runtime.errors import UserError

FIRST_PORT = 7860  # Gradio's: it takes the first free one from here


def credentials(text: str) -> tuple[str, str]:
    """Returns the user and the password of `USER:PASSWORD`."""
    user, _, password = text.partition(":")
    if not user or not password:
        raise ValueError("takes USER:PASSWORD, neither of them empty")  # without repeating a password
    return user, password


Credentials = Annotated[tuple[str, str], BeforeValidator(credentials)]

def check_address(name: str, port: int | None, auth: tuple[str, str] | None) -> None:
    """Raises UserError where the page cannot listen, or where anyone on the network could use it."""
    family, address = resolve(name)
    if not is_loopback(address) and not auth:
        raise UserError(f"--server_name {name}: anyone on the network could use the page: set --auth USER:PASSWORD, or "
                        f"leave --server_name out and come through ssh -L {port or FIRST_PORT}:127.0.0.1:"
                        f"{port or FIRST_PORT} {node(address)}")
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port or 0))
        except OSError as error:
            raise cannot_listen(error, name, port) from error


def resolve(name: str) -> tuple[int, str]:
    """Returns family and address of a host name or address; an IPv6 address may be in brackets."""
    try:
        (family, *_, (address, *_)), *_ = socket.getaddrinfo(name.strip("[]"), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, ValueError) as error:
        raise UserError(f"--server_name {name} is no name or address: 127.0.0.1 is for this machine alone, and "
                        "0.0.0.0 for its whole network") from error
    return family, str(address)


def is_loopback(address: str) -> bool:
    return ip_address(address.partition("%")[0]).is_loopback


def cannot_listen(error: OSError, name: str, port: int | None) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(f"--port {port} is in use: name another, or leave it out for the first free one from "
                         f"{FIRST_PORT}")
    if error.errno == errno.EACCES:
        return UserError(f"--port {port} is open to the system only: name one from 1024")
    return UserError(f"--server_name {name} is no address of this machine ({error.strerror}): leave it out, or give "
                     "0.0.0.0")


def node(address: str) -> str:
    """Returns the name by which other machines know this one; an address of its own stays as it is."""
    ip = ip_address(address.partition("%")[0])
    return socket.gethostname() if ip.is_unspecified or ip.is_loopback else address


def notice(name: str, port: int) -> str | None:
    """Returns a line that warns of a page that listens to the network, or None where it does not."""
    address = resolve(name)[1]
    if is_loopback(address):
        return None
    login = os.environ.get("SLURM_SUBMIT_HOST", "LOGIN")  # the node that the job was submitted from
    return (f"http://{node(address)}:{port} is not encrypted: where you do not trust the network, open a tunnel on "
            f"your own computer, ssh -L {port}:{node(address)}:{port} {login}, and visit http://127.0.0.1:{port}")


@contextmanager
def without_proxy() -> Iterator[None]:
    """Keeps Gradio's calls to its own server, by which it sees whether it runs, away from a cluster's proxy."""
    before = {name: os.environ.get(name) for name in ("no_proxy", "NO_PROXY")}
    os.environ.update(dict.fromkeys(before, "*"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
