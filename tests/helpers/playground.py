"""The playground in a browser: opening it, running it, and using its controls as a person does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from helpers.accessibility import axe_source, too_small, violations
from helpers.body_record import Bodies
from helpers.browser import Page
from helpers.server_process import Server
from steer_engine.demo.__main__ import MODEL

ANSWERS = "#columns .turn:last-child .body"
"""The newest answer of each column."""
EDIT = "#edits > .edit"
"""The card of the only edit."""


def opened(server: Server, profile: Path, shared: dict[str, Any] | None = None) -> Page:
    """A page that is connected and shows one edit."""
    page = Page(f"{server.url}/playground" + (f"#{quote(json.dumps(shared))}" if shared else ""), profile)
    try:
        page.show_as()
        page.wait_for(f"document.getElementById('about')?.textContent.startsWith('{MODEL}')")
        page.wait_for("document.querySelector('.edit .dose')?.textContent")
    except BaseException:
        page.__exit__(None, None, None)
        raise
    return page


def answered(page: Page) -> list[str]:
    """The newest answer of each column, once all are complete."""
    status = page.wait_for("/\\d of \\d answers are complete/.exec(document.getElementById('status').textContent)?.[0]")
    assert status[0] == status[5], (status, page.the("#error", "textContent"))
    return page.each(ANSWERS, "innerText")


def compared(page: Page, button: str = "#compare") -> list[str]:
    """The answers of a run that is started by a click."""
    page.evaluate("document.getElementById('status').textContent = document.getElementById('error').textContent = ''")
    page.click(button)
    page.wait_for("document.getElementById('status').textContent || document.getElementById('error').textContent")
    assert page.the("#error", "textContent") == ""
    return answered(page)


def received(page: Page, bodies: Bodies) -> dict[str, Any]:
    """The steering of the steered answer of a new run, as the server receives it."""
    before = bodies.count()
    compared(page)
    steered = [body for body in bodies.since(before) if "edits" in (body["steering"] or {})]
    assert len(steered) == 1, bodies.since(before)
    steering: dict[str, Any] = steered[0]["steering"]
    return steering


def use(page: Page, selector: str, value: str) -> None:
    """Enter or choose a value. It must be visible, allowed, and offered."""
    control = f"document.querySelector({json.dumps(selector)})"
    opening = "for (let d = c.closest('details'); d; d = d.parentElement.closest('details')) d.open = true"
    kind = page.evaluate(f"(() => {{ const c = {control}; {opening}; return c.getAttribute('role') ?? c.type; }})()")
    assert page.evaluate(f"{control}.checkVisibility() && !{control}.disabled"), selector
    if kind == "select-one":
        option = f"[...{control}.options].find((each) => each.value === {json.dumps(value)})"
        assert page.evaluate(f"{option}?.disabled") is False, (selector, value)
    if kind == "select-one" or (value == "" and kind not in ("checkbox", "button")):
        changed = "new Event('input', {bubbles: true})"
        page.evaluate(f"{control}.value = {json.dumps(value)}, {control}.dispatchEvent({changed})")
    elif kind in ("checkbox", "button"):
        page.click(selector)
    else:
        page.write(selector, value)
        if kind == "combobox":
            page.press("Escape")
            page.evaluate("document.activeElement.blur()")
            page.wait_for("!document.querySelector('[aria-busy=true]')")


def sent_by_programs(page: Page, bodies: Bodies) -> dict[str, dict[str, Any]]:
    """What the server receives from the copied curl command, Python program and Node program, run with a key."""
    page.write("#key", "a-key")
    found = {}
    commands = {"python": [sys.executable, "-"]}
    if shutil.which("curl"):
        commands["curl"] = ["sh"]
    if shutil.which("node"):
        commands["node"] = ["node", "--input-type=module", "-"]
    for name, command in commands.items():
        page.click(f"#copy-{name}")
        page.wait_for(f"document.getElementById('copied').textContent.toLowerCase().includes('{name}')")
        before = bodies.count()
        environment = os.environ | {"API_KEY": "a-key"}
        program = page.the("#code", "textContent")
        subprocess.run(command, input=program, text=True, check=True, timeout=120, env=environment, capture_output=True)
        (found[name],) = bodies.since(before)
    return found


def fits_and_is_accessible(page: Page) -> None:
    """Whatever is open, at both widths, each in a theme."""
    for width, dark in ((1280, False), (390, True)):
        page.show_as(width=width, height=844, dark=dark)
        assert axe_source() is None or violations(page) == []
        assert too_small(page) == []
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    page.show_as()


def picture(page: Page, name: str) -> None:
    """With `STEER_TEST_PICTURES`: the page as it is shown now, into that folder."""
    if folder := os.environ.get("STEER_TEST_PICTURES"):
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(Path(folder) / name)
