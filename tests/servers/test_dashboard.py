"""A running server has every metric that deploy/ shows and alerts on, and Debian's Prometheus can scrape them."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from helpers.asking import COMPLETIONS, STRONG
from helpers.monitoring import PROMETHEUS, metrics_of, panel_queries, rules
from helpers.server_process import Server, free_port

PROMETHEUS_BINARY = shutil.which("prometheus")
SCRAPE_SECONDS = 30


@pytest.fixture(scope="module")
def used(monitored: Server) -> Server:
    """A server that has answered, refused and turned down an upload: counters with labels exist from then on."""
    server = monitored
    assert COMPLETIONS.ask(server, steering=STRONG).status_code == 200
    assert COMPLETIONS.ask(server, steering={"edits": [{"vector": "nobody"}]}).status_code == 404
    assert httpx.put(f"{server.url}/v1/steering/vectors/new", content=b"", timeout=60).status_code == 403
    return server


def test_every_metric_is_on_the_page(used: Server) -> None:
    page = {re.split(r"[ {]", line)[0] for line in used.get("/metrics").text.splitlines() if not line.startswith("#")}
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    queried = {name for _, query in panel_queries() for name in metrics_of(query)}
    queried |= {name for rule in rules() for name in metrics_of(rule["expr"])}
    assert queried - recorded - {"up"} - page == set()


def test_vectors_that_were_shipped_are_counted(used: Server) -> None:
    (line,) = re.findall(r"^steer_engine_shipped_bytes_total (\S+)$", used.get("/metrics").text, re.MULTILINE)
    assert float(line) > 14 * 576 * 4, "the vector of the steered request: 14 blocks"


@pytest.mark.skipif(PROMETHEUS_BINARY is None, reason="Prometheus is not installed (Debian: prometheus)")
def test_every_panel_has_a_series_in_prometheus(used: Server, tmp_path: Path) -> None:
    """The shipped configuration with a shorter scrape interval."""
    assert PROMETHEUS_BINARY is not None
    config = shutil.copytree(PROMETHEUS, tmp_path / "config")
    text = (config / "prometheus.yml").read_text()
    (config / "prometheus.yml").write_text(text.replace("interval: 15s", "interval: 1s"))
    (config / "targets" / "servers.yml").write_text(f'- targets: ["127.0.0.1:{used.port}"]\n')
    port = free_port()
    command = [PROMETHEUS_BINARY, f"--config.file={config}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        waiting = list(panel_queries())
        deadline = time.monotonic() + SCRAPE_SECONDS
        while waiting and time.monotonic() < deadline:
            time.sleep(0.5)
            waiting = [(title, query) for title, query in waiting if not series_of(port, query)]
        assert waiting == [], (tmp_path / "prometheus.log").read_text()[-2000:]
        firing = httpx.get(f"http://127.0.0.1:{port}/api/v1/alerts", timeout=10).json()["data"]["alerts"]
        assert [alert["labels"]["alertname"] for alert in firing if alert["state"] == "firing"] == []
    finally:
        process.terminate()
        process.wait(20)


def series_of(port: int, query: str) -> list[object]:
    try:
        answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query}, timeout=10)
    except httpx.TransportError:  # not up yet
        return []
    assert answer.status_code == 200, answer.text
    found: list[object] = answer.json()["data"]["result"]
    return found
