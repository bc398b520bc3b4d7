"""The playground: a static page without outside resources, tested in a real browser if one is installed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import quote, unquote

import httpx
import pytest
from fastapi import FastAPI
from helpers import browser
from helpers.asking import STRONG
from helpers.browser import Page
from helpers.server_process import Server

from steer_engine.api import routes

with_browser = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium")


async def test_the_page_loads_nothing_from_other_hosts() -> None:
    app = FastAPI()
    app.include_router(routes.playground_router)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server") as client:
        page = await client.get("/playground")
        assert page.headers["content-type"].startswith("text/html")
        linked = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert sorted(linked) == ["playground.css", "playground.js"]
        for name in linked:
            part = await client.get(f"/{name}")
            assert part.status_code == 200
            assert "http://" not in part.text
            assert "https://" not in part.text
            assert "localStorage" not in part.text
        for answer in (page, part):
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?! src)|\sstyle=|\son\w+=", page.text)


@with_browser
def test_compare_plain_and_steered(server: Server, tmp_path: Path) -> None:
    shared = {"prompt": "Describe the weather today.", "tokens": 6, "temperature": 0, "steering": STRONG}
    with Page(f"{server.url}/playground#{quote(json.dumps(shared))}", tmp_path / "profile") as page:
        page.wait_for("document.querySelectorAll('.edit').length === 1")
        assert page.evaluate("document.querySelector('.scale').value") == "60"
        assert page.evaluate("document.querySelector('.blocks').value") == "8-21"
        assert "smollm2-135m: 30 blocks" in page.evaluate("document.getElementById('about').textContent")
        page.evaluate("document.getElementById('run').click()")
        applied = page.wait_for("document.getElementById('applied').textContent")
        plain, steered = (
            page.evaluate(f"document.getElementById('{name}').textContent") for name in ("plain", "steered")
        )
        assert applied.startswith("applied: sha256:")
        assert plain
        assert plain != steered
        curl = page.evaluate("document.getElementById('code').textContent")
        assert json.loads(curl.partition("-d '")[2].removesuffix("'"))["steering"] == {
            "edits": [{"vector": "east", "scale": 60, "blocks": "8-21", "scope": "all"}]
        }
        page.evaluate("document.getElementById('key').value = 'a-secret'")
        link = page.evaluate("link()")
        assert json.loads(unquote(link.partition("#")[2]))["prompt"] == shared["prompt"]
        for text in (link, page.evaluate("curl()"), page.evaluate("python()")):
            assert "a-secret" not in text
        compile(page.evaluate("python()"), "copied", "exec")
        page.screenshot(tmp_path / "playground.png")


@with_browser
def test_other_fields_of_an_edit_are_kept(server: Server, tmp_path: Path) -> None:
    edit = {"vector": "east", "scale": 60, "scope": {"from": "generation", "end": 2}}
    shared = {"prompt": "x", "tokens": 4, "temperature": 0, "steering": {"edits": [edit]}}
    with Page(f"{server.url}/playground#{quote(json.dumps(shared))}", tmp_path / "profile") as page:
        page.wait_for("document.querySelectorAll('.edit').length === 1")
        assert page.evaluate("JSON.stringify(steering().edits[0].scope)") == json.dumps(edit["scope"]).replace(" ", "")
        assert "last_prompt_token" in page.evaluate("document.querySelector('.scope').textContent")
        page.evaluate("document.getElementById('run').click()")
        applied = page.wait_for("document.getElementById('applied').textContent")
        assert applied.endswith("; tokens of each edit: 2")
        page.evaluate("document.querySelector('.more').value = '[1]'")
        page.evaluate("document.getElementById('run').click()")
        assert "must be a JSON object" in page.wait_for("document.getElementById('error')?.textContent")


@with_browser
def test_an_error_is_shown_as_text(server: Server, tmp_path: Path) -> None:
    shared = {"prompt": "x", "tokens": 2, "steering": {"edits": [{"vector": "east", "scale": 1, "blocks": "8-99"}]}}
    with Page(f"{server.url}/playground#{quote(json.dumps(shared))}", tmp_path / "profile") as page:
        page.wait_for("document.querySelectorAll('.edit').length === 1")
        page.evaluate("document.getElementById('run').click()")
        assert "99" in page.wait_for("document.getElementById('error')?.textContent")


@with_browser
def test_damaged_links_do_no_harm(server: Server, tmp_path: Path) -> None:
    script = "<img src=x onerror=document.title='owned'>"
    for text in ("%", "null", "3", '{"steering": {"edits": [null, 3]}}', json.dumps({"prompt": script})):
        with Page(f"{server.url}/playground#{quote(text)}", tmp_path / "profile") as page:
            page.wait_for("document.getElementById('about')?.textContent.includes('vectors')")
            assert page.evaluate("document.getElementById('error').hidden")
            assert page.evaluate("document.title") == "Steer Engine playground"
