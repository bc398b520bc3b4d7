"""A page in headless Chromium, driven by its debugging protocol."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from websockets.sync.client import ClientConnection, connect

from helpers.server_process import free_port

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

CODES = {"Enter": "Enter", "Tab": "Tab", " ": "Space", "Escape": "Escape"}
KEY_NUMBERS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38,
               "ArrowRight": 39, "ArrowDown": 40}  # fmt: skip


class Page:
    """Opens `url`; `evaluate` runs JavaScript in it and returns its (awaited) value."""

    def __init__(self, url: str, profile: Path) -> None:
        assert CHROMIUM is not None
        port = free_port()
        self._process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--remote-debugging-port={port}",
             f"--user-data-dir={profile}", "--window-size=1100,900", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._numbers = itertools.count(1)
        self._ending = ExitStack()
        self._ending.callback(self._process.wait, 20)
        self._ending.callback(self._process.kill)
        try:
            self._socket = self._connect(port)
            self._call("Page.enable")
            self._call("Page.navigate", url=url)
        except BaseException:
            self._ending.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.close()

    def evaluate(self, script: str) -> Any:
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def each(self, selector: str, what: str) -> list[Any]:
        """A property, or the value of a method, of every element that a CSS selector finds."""
        found: list[Any] = self.evaluate(
            f"[...document.querySelectorAll({json.dumps(selector)})].map((each) => each.{what})"
        )
        return found

    def the(self, selector: str, what: str) -> Any:
        """The same of the only element that a selector finds."""
        (found,) = self.each(selector, what)
        return found

    def wait_for(self, script: str, seconds: float = 60) -> Any:
        """The value of `script` as soon as it is true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := self.evaluate(script):
                return found
            time.sleep(0.1)
        raise AssertionError(f"{script} stayed false; the page says: {self.evaluate('document.body.innerText')}")

    def press(self, key: str, *, ctrl: bool = False) -> None:
        """One key, as on a keyboard: its name in DOM ("Tab", "Enter", "ArrowDown") or a character."""
        text = {"Enter": "\r", " ": " "}.get(key, key if len(key) == 1 else "")
        about: dict[str, Any] = {"key": key, "modifiers": 2 if ctrl else 0}
        about |= {"code": CODES.get(key, ""), "windowsVirtualKeyCode": KEY_NUMBERS.get(key, 0)}
        self._call("Input.dispatchKeyEvent", type="keyDown", **about, **({} if ctrl or not text else {"text": text}))
        self._call("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text: str) -> None:
        """Into the focused control, as an input method does."""
        self._call("Input.insertText", text=text)

    def write(self, selector: str, text: str) -> None:
        """Replace what is in a field."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus(), document.activeElement.select()")
        self.type(text)

    def focused(self) -> str:
        """What has the focus: its id, its name in its form, or its text."""
        name = "document.activeElement.id || document.activeElement.dataset.field || document.activeElement.textContent"
        return str(self.evaluate(name))

    def tab_to(self, name: str) -> None:
        """Press Tab until a control has the focus; each time, the focus must be visible."""
        for _ in range(60):
            self.press("Tab")
            outline = self.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", f"The focus of {self.focused()} cannot be seen."
            if self.focused() == name:
                return
        raise AssertionError(f"The Tab key does not reach {name}.")

    def click(self, selector: str) -> None:
        """A click with the mouse at the middle of an element, which is scrolled into view."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        (box,) = self.each(selector, "getBoundingClientRect().toJSON()")[:1]
        where = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], button="left", clickCount=1)

    def show_as(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """The size of the window, and the theme that the system asks for."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[theme])

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """whole: the page from top to bottom, not only what the window shows."""
        path.write_bytes(
            base64.b64decode(self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])
        )

    def _connect(self, port: int) -> ClientConnection:
        deadline = time.monotonic() + 60
        while True:
            try:
                targets = httpx.get(f"http://127.0.0.1:{port}/json", timeout=5).json()
                page = next(target for target in targets if target["type"] == "page")
                return self._ending.enter_context(connect(page["webSocketDebuggerUrl"], max_size=None))
            except (httpx.TransportError, StopIteration):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=120))
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                result: dict[str, Any] = message["result"]
                return result
