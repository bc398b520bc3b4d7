"""`steer-engine probe`: its help, and every error that needs no engine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from helpers.no_weights import NO_WEIGHTS
from typer.testing import CliRunner

from steer_engine.cli.main import app
from steer_engine.derive.probe import Examples, ProbeFit, fit_blocks
from steer_engine.errors import SteerError
from steer_engine.evaluate.plots import probe as draw
from steer_engine.vectors import ControlVector, VectorMetadata, save


@pytest.fixture
def prompts(tmp_path: Path) -> tuple[str, str]:
    """Files of twelve prompts each: plain text, and JSONL."""
    (tmp_path / "p.txt").write_text("".join(f"{i} was lovely.\n" for i in range(12)))
    (tmp_path / "n.jsonl").write_text("".join(json.dumps({"text": f"{i} was awful."}) + "\n" for i in range(12)))
    return str(tmp_path / "p.txt"), str(tmp_path / "n.jsonl")


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A probe at blocks 2 and 3."""
    save(fitted().vector, tmp_path / "mood.safetensors")
    return tmp_path / "mood.safetensors"


def fitted() -> ProbeFit:
    """A probe of hidden size 8 at blocks 2 and 3, trained on 40 prompts of each class."""
    rng = np.random.default_rng(2)

    def side(shift: float) -> Examples:
        rows_NLD = (rng.normal(size=(40, 2, 8)) + shift).astype(np.float32)
        return Examples(rows_NLD=rows_NLD, prompt_N=np.arange(40), norm_L=np.ones(2) * 120, norm_count=40)

    return fit_blocks(side(0.5), side(-0.5), (2, 3), VectorMetadata(num_blocks=9), at="mean_prompt", rate=0.1)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["probe", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})


def refusal(*arguments: object) -> str:
    """The one-line message of a refused command for a model that does not exist, so that no engine can start."""
    done = invoke(*arguments, "--model", NO_WEIGHTS)
    assert isinstance(done.exception, SteerError), done.output  # which `steer-engine` prints as one line
    assert "\n" not in done.exception.message
    return done.exception.message


def test_help_teaches() -> None:
    assert "report" in invoke("--help").output
    shown = invoke("fit", "--help")
    assert shown.exit_code == 0
    for part in ("steer-engine probe fit", "--fpr", "every_prompt_token", "0.5 is chance", "sigmoid(a * <x, v> + b)"):
        assert part in shown.output
    shown = invoke("report", "--help")
    for part in ("bootstrap interval", "Brier", "--blocks"):
        assert part in shown.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "svm"), "--method 'svm' is none of diffmean, logistic, lda"),
        (("--at", "max_prompt"), "--at 'max_prompt' is none of last_prompt_token, mean_prompt, every_prompt_token"),
        (("--blocks", "9-2"), "--blocks: '9-2' runs backwards; write '2-9'"),
        (("--blocks", "99999"), "--blocks: 99999 is not a block number"),
        (("--fpr", "0"), "--fpr 0: a false-positive rate is between 0 and 1, for example 0.01"),
        (("--fpr", "1.5"), "--fpr 1.5: a false-positive rate is between 0 and 1"),
        (("--fpr", "nan"), "--fpr nan: a false-positive rate is between 0 and 1"),
        (("--plot", "v.jpg"), "must end in .svg or .png"),
    ],
)
def test_invalid_options_need_no_engine(
    options: tuple[str, ...], message: str, prompts: tuple[str, str], tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "v.safetensors")
    assert message in refusal("fit", "--positive", prompts[0], "--negative", prompts[1], *out, *options)
    assert not (tmp_path / "v.safetensors").exists()


def test_unusable_outputs_need_no_engine(prompts: tuple[str, str], tmp_path: Path) -> None:
    classes = ("fit", "--positive", prompts[0], "--negative", prompts[1])
    assert "must end in .safetensors or .gguf" in refusal(*classes, "--out", tmp_path / "v.bin")
    gguf = refusal(*classes, "--out", tmp_path / "v.gguf")
    assert "rejects a control vector with a direction for block 0. Leave it out, for example with --blocks" in gguf
    (tmp_path / "v.safetensors").write_bytes(b"precious")
    found = refusal(*classes, "--out", tmp_path / "v.safetensors")
    assert "this file exists already; choose another name, or --force" in found
    # A missing folder is made, but not inside a file.
    below = refusal(*classes, "--out", tmp_path / "v.safetensors" / "folder" / "w.safetensors")
    assert f"{tmp_path}/v.safetensors is not a folder that can be written to; choose another place." in below
    picture = refusal(*classes, "--out", tmp_path / "w.safetensors", "--plot", tmp_path / "v.safetensors" / "p.svg")
    assert "p.svg: " in picture
    assert "is not a folder that can be written to" in picture


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_folder_without_permission_is_named(prompts: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    classes = ("fit", "--positive", prompts[0], "--negative", prompts[1])
    assert "locked is not a folder that can be written to" in refusal(
        *classes, "--out", tmp_path / "locked" / "v.safetensors"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", "p.txt: 0 positive prompt(s) are too few; a probe needs at least 10 of each class"),
        ("p.txt", "a\nb\n" * 20, "p.txt: 2 positive prompt(s) are too few"),
        ("p.jsonl", "", "p.jsonl: the file is empty"),
        ("p.jsonl", '{"text": "a", "label": "negative"}\n{"text": "b", "label": "negative"}', "0 positive prompt(s)"),
        ("gone.txt", None, "gone.txt: cannot be read"),
    ],
)
def test_unusable_prompts_are_named(
    name: str, content: str | None, message: str, prompts: tuple[str, str], trained: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    classes = ("--positive", tmp_path / name, "--negative", prompts[1])
    assert message in refusal("fit", *classes, "--out", tmp_path / "v.safetensors")
    assert message in refusal("report", trained, *classes)


def test_a_prompt_in_both_classes_is_refused(prompts: tuple[str, str], trained: Path) -> None:
    assert "12 prompt(s) are in both classes" in refusal(
        "report", trained, "--positive", prompts[0], "--negative", prompts[0]
    )


def test_a_report_needs_a_trained_probe(prompts: tuple[str, str], trained: Path, tmp_path: Path) -> None:
    save(ControlVector(directions={2: np.ones(8)}), tmp_path / "plain.safetensors")
    classes = ("--positive", prompts[0], "--negative", prompts[1])
    found = refusal("report", tmp_path / "plain.safetensors", *classes)
    assert found.endswith("it has no probe in its metadata; train one with `steer-engine probe fit`.")
    assert "no direction at block(s) 4; it has 2-3" in refusal("report", trained, *classes, "--blocks", "3-4")
    assert "gone.safetensors" in refusal("report", tmp_path / "gone.safetensors", *classes)
    (tmp_path / "mood.report.svg").write_text("precious")
    assert "mood.report.svg: this file exists already" in refusal("report", trained, *classes)


def test_a_picture_is_reproducible_and_needs_no_calibration() -> None:
    pytest.importorskip("matplotlib")
    report = fitted().held_out
    picture = draw(report, ".svg")
    assert picture.startswith(b"<svg")
    assert picture == draw(report, ".svg")
    assert draw(report, ".png").startswith(b"\x89PNG")


def test_the_table_has_all_numbers_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    from steer_engine.cli.probe import _print

    fit = fitted()
    _print(fit.held_out, fit.auroc)
    printed = capsys.readouterr()
    assert printed.out == ""
    rows = [line for line in printed.err.splitlines() if line[:1].isdigit()]
    assert len(rows) == 2
    assert [line.split()[0] for line in rows if "best" in line] == [str(fit.held_out.best)]
    best = fit.held_out.by_block[fit.held_out.best]
    for number in (fit.auroc[fit.held_out.best], best.auroc, best.low, best.high, best.brier, best.calibration_error):
        assert any(f"{number:.3f}" in line for line in rows if "best" in line)
    assert "Measured on 12 positive and 12 negative held-out prompts, at mean_prompt." in printed.err
