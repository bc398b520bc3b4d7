from __future__ import annotations

import io
from importlib.util import find_spec

import pytest
from rich.console import Console

from steer_engine.derive.progress import Progress, new_console


def run(console: Console, *, enabled: bool = True) -> None:
    with Progress(enabled=enabled, console=console) as progress:
        with progress.waiting("starting"):
            pass
        with progress.counting("capturing", total=3, unit="pairs") as advance:
            advance(1)
            advance(2)


def test_a_terminal_sees_a_bar() -> None:
    out = io.StringIO()
    run(Console(file=out, force_terminal=True, width=100))
    assert "capturing pairs" in out.getvalue()
    assert "3/3" in out.getvalue()


def test_a_file_gets_one_line_a_stage() -> None:
    out = io.StringIO()
    run(Console(file=out, force_terminal=False))
    assert out.getvalue() == "starting\ncapturing 3 pairs\n"


def test_silence_on_demand() -> None:
    for terminal in (False, True):
        out = io.StringIO()
        run(Console(file=out, force_terminal=terminal), enabled=False)
        assert out.getvalue() == ""


@pytest.mark.skipif(find_spec("ipywidgets") is not None, reason="ipywidgets is installed")
def test_a_notebook_without_widgets_gets_one_line_a_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert Console().is_jupyter
    run(new_console())
    assert capsys.readouterr().err == "starting\ncapturing 3 pairs\n"
