"""`steer-engine condition fit`: its help, and every error that needs no engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from helpers.no_weights import NO_WEIGHTS
from typer.testing import CliRunner

from steer_engine.cli.main import app
from steer_engine.derive.condition import choose
from steer_engine.errors import DerivationError, EvaluationError, SteerError
from steer_engine.evaluate.plots import condition as draw
from steer_engine.vectors import ControlVector, VectorMetadata, load, save
from steer_engine.vectors.metadata import FittedCondition


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    """A file with blocks 2, 3 and 4."""
    made = ControlVector(
        directions={block: np.ones(8, dtype=np.float32) for block in (2, 3, 4)}, metadata=VectorMetadata(num_blocks=9)
    )
    save(made, tmp_path / "v.safetensors")
    return tmp_path / "v.safetensors"


@pytest.fixture
def prompts(tmp_path: Path) -> tuple[str, str]:
    """Files of ten prompts each: plain text, and JSONL."""
    (tmp_path / "p.txt").write_text("".join(f"Is {i} odd?\n" for i in range(10)))
    (tmp_path / "n.jsonl").write_text("".join(json.dumps({"text": f"{i} is odd."}) + "\n" for i in range(10)))
    return str(tmp_path / "p.txt"), str(tmp_path / "n.jsonl")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["condition", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})


def refusal(*arguments: object) -> str:
    """The message of a refused `condition fit` for a model that does not exist, so that no engine can start."""
    done = invoke("fit", *arguments, "--model", NO_WEIGHTS)
    assert isinstance(done.exception, SteerError), done.output  # which `steer-engine` prints as one line
    return done.exception.message


def test_help_teaches() -> None:
    done = invoke("fit", "--help")
    assert done.exit_code == 0
    for part in ("steer-engine condition fit medical.safetensors", "--held-out", "--chat", "0.5 is chance", "`when`"):
        assert part in done.output
    assert "fit" in invoke("--help").output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--at", "last"), "--at 'last' is none of last_prompt_token, mean_prompt, max_prompt"),
        (("--measure", "l2"), "--measure 'l2' is none of cosine, dot"),
        (("--blocks", "3-5"), "--blocks: the vector has no direction at block(s) 5; it has 2-4"),
        (("--blocks", "x"), "--blocks: 'x' is not valid"),
        (("--num-blocks", "4"), "--num-blocks 4: choose 1 to 3"),
        (("--blocks", "3", "--num-blocks", "2"), "--num-blocks 2: choose 1 to 1"),
        (("--out", "v.bin"), "must end in .safetensors or .gguf"),
        (("--plot", "v.jpg"), "must end in .svg or .png"),
    ],
)
def test_invalid_options_need_no_engine(
    options: tuple[str, ...], message: str, vector: Path, prompts: tuple[str, str]
) -> None:
    assert message in refusal(vector, "--positive", prompts[0], "--negative", prompts[1], *options)


@pytest.mark.parametrize("held_out", ["0", "1", "x"])
def test_a_share_that_leaves_nothing_is_a_usage_error(held_out: str, vector: Path, prompts: tuple[str, str]) -> None:
    options = ("--model", NO_WEIGHTS, "--positive", prompts[0], "--negative", prompts[1], "--held-out", held_out)
    assert invoke("fit", vector, *options).exit_code == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "p.txt: 0 positive prompt(s) are too few; a condition needs at least 4 of each class"),
        ("p.txt", b"\n a \n\nb\nc\na\n", "p.txt: 3 positive prompt(s) are too few"),
        ("p.txt", b"\xff\xfe", "p.txt: not UTF-8"),
        ("p.jsonl", b"", "p.jsonl: the file is empty"),
        ("p.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "p.jsonl:2: the key 'text' is missing"),
        ("p.jsonl", b"Is it odd?\n", "p.jsonl:1: not JSON"),
        ("gone.txt", None, "gone.txt: cannot be read (No such file or directory). Give a file with one prompt a line."),
        ("gone.jsonl", None, "gone.jsonl: cannot be read"),
    ],
)
def test_unusable_prompts_are_named(
    name: str, content: bytes | None, message: str, vector: Path, prompts: tuple[str, str], tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in refusal(vector, "--positive", tmp_path / name, "--negative", prompts[1])


def test_a_prompt_in_both_classes_is_refused_with_its_lines(vector: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "n.txt").write_text("e\n\nc\nf\ng\nd\n")
    found = refusal(vector, "--positive", tmp_path / "p.txt", "--negative", tmp_path / "n.txt")
    assert found.startswith(f"2 prompt(s) are in both classes, the first in {tmp_path}/p.txt:3 and {tmp_path}/n.txt:3.")


def test_a_broken_or_missing_vector_is_named(tmp_path: Path, prompts: tuple[str, str]) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    for name in ("bad.safetensors", "gone.safetensors"):
        assert name in refusal(tmp_path / name, "--positive", prompts[0], "--negative", prompts[1])


def test_nothing_is_replaced_without_force(vector: Path, prompts: tuple[str, str], tmp_path: Path) -> None:
    classes = ("--positive", prompts[0], "--negative", prompts[1])
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"precious")
    assert "other.safetensors: this file exists already" in refusal(vector, *classes, "--out", other)
    (tmp_path / "v.condition.svg").write_text("precious")
    assert "v.condition.svg: this file exists already" in refusal(vector, *classes)
    (tmp_path / "v.condition.svg").unlink()
    condition = FittedCondition(blocks=(3,), measure="dot", at="max_prompt", above=1.0)
    save(load(vector).with_metadata(condition=condition), vector)
    assert "v.safetensors: it has a condition already" in refusal(vector, *classes)
    # With --force, the same commands get as far as the engine, which cannot open this model.
    for options in ((), ("--out", str(other))):
        message = refusal(vector, *classes, *options, "--force", "--at", "nowhere")
        assert message.startswith("--at 'nowhere'")
    assert other.read_bytes() == b"precious"
    assert load(vector).metadata.condition == condition


def test_gguf_cannot_have_block_0(tmp_path: Path, prompts: tuple[str, str]) -> None:
    save(ControlVector(directions={0: np.ones(8)}), tmp_path / "v.safetensors")
    options = ("--positive", prompts[0], "--negative", prompts[1], "--out", tmp_path / "v.gguf")
    assert "llama.cpp rejects a control vector with a direction for block 0" in refusal(
        tmp_path / "v.safetensors", *options
    )


def test_a_requested_picture_needs_matplotlib(
    vector: Path, prompts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = ("--positive", prompts[0], "--negative", prompts[1], "--plot", tmp_path / "p.png")
    done = invoke("fit", vector, "--model", NO_WEIGHTS, *options)
    assert isinstance(done.exception, EvaluationError)
    assert "steer-engine[report]" in done.exception.message


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_a_picture_shows_both_classes_and_is_reproducible(num_blocks: int) -> None:
    pytest.importorskip("matplotlib")
    positive_NL, negative_NL = np.random.default_rng(2).normal(size=(2, 50, 3))
    fit = choose(positive_NL + 3, negative_NL, (4, 5, 9), measure="cosine", at="mean_prompt", num_blocks=num_blocks)
    picture = draw(fit, ".svg")
    assert picture.startswith(b"<svg")
    assert picture == draw(fit, ".svg")
    assert draw(fit, ".png").startswith(b"\x89PNG")


def test_a_repeated_prompt_counts_once(tmp_path: Path) -> None:
    from steer_engine.derive.condition_fit import load_prompts

    (tmp_path / "p.txt").write_text("a\nb\na\nc\nd\n b \n")
    found = load_prompts(tmp_path / "p.txt", "positive")
    assert [(text.text, text.line) for text in found.items] == [("a", 1), ("b", 2), ("c", 4), ("d", 5)]
    assert found.repeated == 2


def test_labels_and_pairs_choose_the_prompts_of_a_class(tmp_path: Path) -> None:
    from steer_engine.derive.condition_fit import load_prompts

    lines = [{"text": f"{label} {i}", "label": label} for i in range(5) for label in ("positive", "negative")]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = [{"positive": f"positive {i}", "negative": f"negative {i}"} for i in range(5)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in pairs))
    for name in ("labels", "pairs"):
        for label in ("positive", "negative"):
            found = load_prompts(tmp_path / f"{name}.jsonl", label)
            assert [text.text for text in found.items] == [f"{label} {i}" for i in range(5)]
    only = "".join(json.dumps(line) + "\n" for line in lines[::2])
    (tmp_path / "labels.jsonl").write_text(only)
    with pytest.raises(DerivationError, match=r"labels\.jsonl: 0 negative prompt\(s\)"):
        load_prompts(tmp_path / "labels.jsonl", "negative")


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_the_table_marks_the_chosen_blocks(num_blocks: int, capsys: pytest.CaptureFixture[str]) -> None:
    from steer_engine.cli.condition import _print

    positive_NL, negative_NL = np.random.default_rng(2).normal(size=(2, 50, 3))
    _print(choose(positive_NL + 3, negative_NL, (4, 5, 9), measure="dot", at="mean_prompt", num_blocks=num_blocks))
    printed = capsys.readouterr()
    assert printed.out == ""
    rows = [line for line in printed.err.splitlines() if line[:1].isdigit()]
    assert len(rows) == 3 + (num_blocks > 1)  # the combination has a row of its own
    assert [line.count(",") for line in rows if "chosen" in line] == [num_blocks - 1]
    assert "On 15 positive and 15 negative held-out prompts: F1 " in printed.err
