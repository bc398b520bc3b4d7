"""`steer-engine serve`: vLLM's flags and ours become an armed start; errors are one sentence."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from steer_engine.errors import SteerError, UnsupportedEngineError, VectorFileError
from steer_engine.settings import CONFIG_KEY, MIRROR_SECONDS_ENV, MIRROR_URL_ENV, MONITORS_ENV, SteeringConfig
from steer_engine.vectors import ControlVector, save
from steer_engine.vectors.mirror import STATE
from steer_engine.vllm import flags, launch


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = ("STEER_ENGINE_VECTORS", "STEER_ENGINE_STRICT", MIRROR_URL_ENV, MIRROR_SECONDS_ENV)
    own += (MONITORS_ENV, "STEER_ENGINE_MAX_MONITORS")
    for name in ("VLLM_PLUGINS", "VLLM_CPU_KVCACHE_SPACE", *own):
        # Set first, so that monkeypatch also undoes what the command sets.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr("steer_engine.models.get_model", lambda model: Path("/cache") / model.name)


def parsed(*argv: str) -> Any:
    from vllm.entrypoints.cli.serve import ServeSubcommand

    return launch._parse(ServeSubcommand(), argv)


def armed(*argv: str) -> Any:
    args = parsed(*argv)
    flags.arm(args)
    return args


def test_the_page_of_flags_lists_exactly_our_flags() -> None:
    page = (Path(__file__).parents[2] / "docs" / "flags.md").read_text()
    table = re.findall(r"^\| `(--steering-[a-z-]+)", page, re.MULTILINE)
    ours = [flag for flag in parsed("org/model").__dict__ if flag.startswith("steering_")]
    assert sorted(table) == sorted("--" + flag.replace("_", "-") for flag in ours)


def test_a_packaged_model_is_served_under_its_name() -> None:
    args = armed("smollm2-135m")
    assert args.model_tag == "/cache/smollm2-135m"
    assert args.served_model_name == ["smollm2-135m"]


def test_other_models_and_served_names_are_unchanged() -> None:
    args = armed("org/model")
    assert (args.model_tag, args.served_model_name) == ("org/model", None)
    assert armed("smollm2-135m", "--served-model-name", "mine").served_model_name == ["mine"]


def test_by_default_all_blocks_and_operations_are_armed(tmp_path: Path) -> None:
    args = armed("org/model")
    assert SteeringConfig.from_additional_config(args.additional_config) == SteeringConfig()
    assert args.shutdown_timeout == launch.SHUTDOWN_TIMEOUT_SECONDS
    assert os.environ["STEER_ENGINE_VECTORS"] == str(tmp_path / "data" / "steer-engine" / "vectors")
    assert Path(os.environ["STEER_ENGINE_VECTORS"]).is_dir()
    assert "STEER_ENGINE_STRICT" not in os.environ


def test_our_flags_reach_the_engine(tmp_path: Path) -> None:
    args = armed(
        "org/model", "--steering-blocks", "8-22", "--steering-ops=add,ablate", "--steering_rows", "2",
        "--steering-vectors", str(tmp_path), "--tensor-parallel-size", "2", "--shutdown-timeout", "7",
        "--steering-sites", "mlp,attn",
    )  # fmt: skip
    config = SteeringConfig.from_additional_config(args.additional_config)
    assert config is not None
    assert (config.blocks, [op.value for op in config.ops], config.rows) == ("8-22", ["add", "ablate"], 2)
    assert config.sites == ("attn", "mlp")
    assert os.environ["STEER_ENGINE_VECTORS"] == str(tmp_path)
    assert (args.tensor_parallel_size, args.shutdown_timeout) == (2, 7)


def test_additional_config_of_the_user_is_kept() -> None:
    args = armed("org/model", "--additional-config", '{"a": 1, "steer_engine": {"rows": 3}}', "--steering-ops", "add")
    assert args.additional_config["a"] == 1
    assert args.additional_config[CONFIG_KEY]["rows"] == 3
    assert args.additional_config[CONFIG_KEY]["ops"] == ["add"]


def test_flags_may_come_from_a_config_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(f"model: org/model\nsteering-blocks: 8-22\nsteering-vectors: {tmp_path}\nmax-model-len: 99\n")
    args = armed("--config", str(file))
    assert args.additional_config[CONFIG_KEY]["blocks"] == "8-22"
    assert args.max_model_len == 99
    assert args.model == "org/model"


def test_flags_that_are_given_several_times_come_in_order_and_without_a_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    theirs = logging.getLogger("vllm.utils.argparse_utils")
    theirs.addHandler(listener)
    try:
        file = tmp_path / "serve.yaml"
        file.write_text("steering-limit: max_edits=1\n")
        args = parsed(
            "org/model", "--steering-monitor", "a=b:1", "--steering_monitor=c", "--steering-limit", "max_edits=4",
            "--config", str(file), "--steering-monitor=d=e:2:dot:above=-1.5", "--steering-limit=max_rows=2",
            "--compilation-config.pass_config.fuse_norm_quant", "false",
        )  # fmt: skip
        assert args.steering_monitor == ["a=b:1", "c", "d=e:2:dot:above=-1.5"]
        assert args.steering_limit == ["max_edits=1", "max_edits=4", "max_rows=2"]
        assert args.model_tag == "org/model"
        assert args.compilation_config.pass_config.fuse_norm_quant is False
        assert warnings == []
        parsed("org/model", "--port", "8001", "--port", "8002")
        assert warnings == ["Found duplicate keys --port"], "vLLM still warns of its own flags"
    finally:
        theirs.removeHandler(listener)
    with pytest.raises(SystemExit):
        parsed("org/model", "--steering-monitor", "--port", "8001")
    # The model after a flag of ours that ends a list of vLLM's.
    args = parsed("--api-key", "secret", "--steering-monitor", "mood", "org/model")
    assert (args.api_key, args.steering_monitor, args.model_tag) == (["secret"], ["mood"], "org/model")


@pytest.mark.parametrize("flag", ["--steering-block", "--steering", "--steering-vec=x", "--steering_row"])
def test_abbreviated_or_unknown_flags_are_errors(flag: str) -> None:
    with pytest.raises(UnsupportedEngineError, match="--steering-blocks"):
        flags.refuse_unknown_flags(["org/model", flag])
    flags.refuse_unknown_flags(["org/model", "--steering-blocks=1", "--steering_rows", "2", "--strange"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--steering-blocks", "22-8"], "backwards"),
        (["--steering-ops", "add,multiply"], "ops"),
        (["--steering-sites", "attn,ffn"], "--steering-sites: 'ffn' is not a site; valid: attn, mlp"),
        (["--steering-rows", "99"], "rows"),
        (["--steering-vectors", "/no/such/folder"], "not a folder"),
        (["--grpc"], "--grpc"),
        (["--enable-elastic-ep"], "--enable-elastic-ep"),
        (["--enable-fault-tolerance"], "--enable-fault-tolerance"),
        (["--additional-config", '{"steer_engine": {"lines": 3}}'], "lines"),
        (["--steering-monitor", "nobody"], "--steering-monitor nobody: There is no control vector 'nobody'"),
        (["--steering-monitor", "a=b:c"], "'a=b:c' is not valid; write NAME"),
        (["--steering-monitor=a", "--steering-monitor=a=b"], "'a' is used twice"),
        (["--steering-monitor=a=b:0-8"], "max_monitors"),
        (["--steering-monitor=a=b:0-8", "--steering-limit=max_monitors=9"], "no control vector 'b'"),
    ],
)
def test_errors_are_one_sentence(argv: list[str], words: str) -> None:
    args = parsed("org/model", *argv)
    with pytest.raises(SteerError) as refused:
        flags.arm(args)
    assert words in refused.value.message
    assert "\n" not in refused.value.message


def test_the_rust_frontend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    args = parsed("org/model")
    with pytest.raises(UnsupportedEngineError, match="VLLM_USE_RUST_FRONTEND"):
        flags.arm(args)


def test_a_home_that_cannot_be_written_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container with HOME=/ and a random user id."""
    monkeypatch.delenv("XDG_DATA_HOME")
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with pytest.raises(UnsupportedEngineError, match=r"--steering-vectors DIR, or STEER_ENGINE_VECTORS"):
        armed("org/model")


def test_strict_names_the_broken_file_before_the_engine_starts(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    with pytest.raises(VectorFileError, match=r"broken\.safetensors"):
        armed("org/model", "--steering-vectors", str(tmp_path), "--steering-strict")
    armed("org/model", "--steering-vectors", str(tmp_path))


def test_monitors_reach_every_process(tmp_path: Path) -> None:
    save(ControlVector(directions={1: np.ones(4, np.float32)}), tmp_path / "north.safetensors")
    given = ("org/model", "--steering-vectors", str(tmp_path))
    armed(*given, "--steering-monitor", "north:1", "--steering-monitor=b=north:1:dot:above=2")
    assert os.environ[MONITORS_ENV].split() == ["north:1", "b=north:1:dot:above=2"]
    armed(*given)  # an operator may set the variable instead
    assert os.environ[MONITORS_ENV].split() == ["north:1", "b=north:1:dot:above=2"]


def test_vllm_plugins_names_all_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    flags.name_plugins()
    assert "steer_engine" in os.environ["VLLM_PLUGINS"].split(",")
    monkeypatch.setenv("VLLM_PLUGINS", "other,steer_engine")
    flags.name_plugins()
    assert os.environ["VLLM_PLUGINS"] == "other,steer_engine"
    monkeypatch.setenv("VLLM_PLUGINS", "")
    flags.name_plugins()
    assert os.environ["VLLM_PLUGINS"] == "steer_engine"


def test_on_a_cpu_the_kv_cache_gets_a_share_of_memory_unless_specified(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("CPU builds only")
    available = psutil.virtual_memory().available
    assert 0.1 * available < armed("org/model").kv_cache_memory_bytes < 0.5 * available
    assert armed("org/model", "--kv-cache-memory-bytes", "1G").kv_cache_memory_bytes == 2**30
    assert armed("org/model", "--gpu-memory-utilization", "0.3").kv_cache_memory_bytes is None
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert armed("org/model").kv_cache_memory_bytes is None


def test_help_shows_our_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help=SteerEngine")
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--steering-vectors", "--steering-blocks", "--steering-strict"))


def test_a_mirror_is_copied_before_the_folder_is_read(tmp_path: Path) -> None:
    remote, local = tmp_path / "remote", tmp_path / "local"
    remote.mkdir()
    local.mkdir()
    save(ControlVector(directions={1: np.ones(4, np.float32)}), remote / "north.safetensors")
    given = ("org/model", "--steering-vectors", str(local), "--steering-mirror", f"file://{remote}")
    armed(*given, "--steering-strict", "--steering-mirror-seconds", "2")
    assert (local / "north.safetensors").exists()
    assert os.environ[MIRROR_URL_ENV] == f"file://{remote}"
    assert float(os.environ[MIRROR_SECONDS_ENV]) == 2
    remote.rename(tmp_path / "unreachable")
    armed(*given)  # an earlier copy exists
    (local / STATE).unlink()
    with pytest.raises(SteerError, match="cannot be read"):
        armed(*given)
    with pytest.raises(SteerError, match="at least 1"):
        armed(*given, "--steering-mirror-seconds", "0")
