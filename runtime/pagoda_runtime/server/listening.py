"""Where a server listens: a host and a port, or a Unix socket; with TLS or without."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from typing import Any

from pagoda_runtime.config import ServerConfig
from pagoda_runtime.errors import FatalError

# As uvicorn has it: the folder of the socket says who may reach it.
_SOCKET_MODE = 0o666


def listen(host: str, port: int, backlog: int, prefix: str = "") -> socket.socket:
    """A listening socket; prefix is of its flags.

    Raises: FatalError: InvalidFlags, the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=backlog)
    except OSError as error:
        raise FatalError(
            "InvalidFlags",
            f"Cannot listen on {host} port {port}: {error.strerror or error}. Choose another "
            f"--{prefix}port or --{prefix}host.",
        ) from error


@contextlib.contextmanager
def listen_on_path(path: str, backlog: int) -> Iterator[socket.socket]:
    """A listening Unix socket, whose file goes with it.

    One that a server left which has ended is replaced.

    Raises: FatalError: InvalidFlags, the path cannot be had.
    """
    try:
        _remove_dead(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(path)
            os.chmod(path, _SOCKET_MODE)
            listener.listen(backlog)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise FatalError(
            "InvalidFlags",
            f"Cannot listen on --uds {path}: {error.strerror or error}. Choose another path.",
        ) from error
    with listener:
        try:
            yield listener
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _remove_dead(path: str) -> None:
    """Remove a socket on which nobody listens; whatever else is there stays."""
    with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as client:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            try:
                client.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)


def tls_options(config: ServerConfig) -> dict[str, Any]:
    """Files and demands of TLS as uvicorn names them; nothing where clients speak plain HTTP.

    Raises: FatalError: InvalidFlags, a file cannot be used.
    """
    if config.ssl_certfile is None:
        return {}
    names = ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs")
    # Without a password here OpenSSL would ask on the terminal for that of a locked key.
    options = {name: getattr(config, name) for name in names} | {"ssl_keyfile_password": ""}
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password="")
        if config.ssl_ca_certs is not None:
            context.load_verify_locations(config.ssl_ca_certs)
    except OSError as error:
        raise FatalError(
            "InvalidFlags",
            f"The files of TLS cannot be used: {error.strerror or error}. --ssl-certfile, "
            "--ssl-keyfile and --ssl-ca-certs name readable PEM files, the key belongs to the "
            "certificate, and it has no password.",
        ) from error
    return options


def describe(listener: socket.socket, *, has_tls: bool = False) -> str:
    """The URL under which a listener answers; of a Unix socket `unix:PATH`."""
    address = listener.getsockname()
    if isinstance(address, str):
        return f"unix:{address}"
    host, port = address[:2]
    return f"http{'s' if has_tls else ''}://{host}:{port}"
