"""nginx with the shipped configuration, in front of whatever a test has."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path

import httpx

from helpers.server_process import free_port

CONFIG = Path(__file__).resolve().parents[2] / "deploy" / "proxy" / "nginx.conf"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
MISSING = NGINX is None or shutil.which("openssl") is None
WHY_MISSING = "nginx or openssl is not installed (Debian: nginx-light, openssl)"
NO_RATE = {"burst=40": "burst=100000", "burst=200": "burst=100000"}
"""For tests of anything but the rates."""


class Proxy:
    """nginx with the shipped configuration; only paths, ports and what a test says are replaced."""

    def __init__(self, folder: Path, upstreams: list[int], certificates: Path, replaced: dict[str, str]) -> None:
        self.port = free_port()
        (folder / "nginx").mkdir(parents=True)
        servers = "".join(f"server 127.0.0.1:{port} max_fails=3 fail_timeout=5s;" for port in upstreams)
        changes = {
            "server server:8000 max_fails=3 fail_timeout=5s;": servers,
            "listen 8443 ": f"listen 127.0.0.1:{self.port} ",
            "/etc/nginx/tls": str(certificates),
            "/tmp/nginx": str(folder / "nginx"),
            "/dev/stdout": str(folder / "access.log"),
            "worker_processes auto": "worker_processes 1",
            **replaced,
        }
        text = CONFIG.read_text()
        for old, new in changes.items():
            assert old in text, old
            text = text.replace(old, new)
        self.log = folder / "access.log"
        (folder / "nginx.conf").write_text(text)
        assert NGINX is not None
        user = "user root;" if os.geteuid() == 0 else ""  # its workers could not enter a test's folder as another one
        command = [NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", f"daemon off; {user}"]
        with (folder / "error.log").open("wb") as errors:
            self.process = subprocess.Popen(command, stderr=errors)
        wait_for_port(self.port)
        self.context = ssl.create_default_context(cafile=str(certificates / "tls.crt"))
        self.client = httpx.Client(base_url=f"https://localhost:{self.port}", verify=self.context, timeout=20)

    def stop(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait(10)

    def raw(self, target: str) -> int:
        """Status of GET with exactly this text as its target; a client library would tidy it up."""
        with (
            socket.create_connection(("127.0.0.1", self.port), 10) as plain,
            self.context.wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        self.last = answer
        return int(answer.split()[1])


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens on port {port}"
            time.sleep(0.02)


def make_certificates(folder: Path) -> Path:
    """A key and a certificate for `localhost`; returns the folder."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt"), "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder
