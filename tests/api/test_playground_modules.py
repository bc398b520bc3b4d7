"""The playground's modules: what each file may be, and their logic, run by Node."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from steer_engine.api import routes

STATIC = Path(routes.__file__).with_name("static")
MODULES = sorted((STATIC / "playground").glob("*.js"))


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
def test_the_logic_of_the_modules(tmp_path: Path) -> None:
    tests = sorted(Path(__file__).parent.glob("playground*.test.mjs"))
    for module in [*MODULES, *tests]:
        shutil.copy(module, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    done = subprocess.run(
        ["node", "--test", *(str(tmp_path / each.name) for each in tests)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^# pass [1-9]\d", done.stdout, re.MULTILINE) or re.search(r"ℹ pass [1-9]\d", done.stdout)


@pytest.mark.parametrize("path", [*MODULES, STATIC / "playground" / "playground.css"], ids=lambda path: path.name)
def test_each_file_is_short_and_loads_nothing_from_elsewhere(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert max(map(len, text.splitlines())) <= 240
    addresses = re.findall(r"\w+://[^\s\"'`)]*", text.replace("http://www.w3.org/2000/svg", ""))
    assert [each for each in addresses if not each.startswith("https?")] == []
    for forbidden in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "localStorage",
        "cookie",
    ):
        assert forbidden not in text
    assert all((path.parent / name).is_file() for name in re.findall(r'from "\./([^"]+)"', text))


async def test_the_page_and_its_parts_are_served_with_a_strict_policy() -> None:
    app = FastAPI()
    app.include_router(routes.playground_router)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server") as client:
        page = await client.get("/playground")
        assert page.headers["content-type"].startswith("text/html")
        linked = re.findall(r'(?:src|href)="([^"#][^"]*)"', page.text)
        assert sorted(linked) == ["playground/main.js", "playground/playground.css"]
        answers = [page]
        for name in ["playground.css", *(module.name for module in MODULES)]:
            answers.append(await client.get(f"/playground/{name}"))
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.headers["content-type"].partition(";")[0] for answer in answers[2:]} == {"text/javascript"}
        for answer in answers:
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert "unsafe" not in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
        for name in ("nothing.js", "..%2fplayground.html", "%2e%2e", "playground.html", "a/b"):
            assert (await client.get(f"/playground/{name}")).status_code == 404
    assert not re.search(r"<script(?! type=\"module\" src)|\sstyle=|\son\w+=", page.text)
