"""`.pt` files: equal to what torch reads, and every number is checked before an array is made."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.damage import SPECIAL, damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer_engine.errors import VectorFileError
from steer_engine.vectors.importers import KINDS, import_vector
from steer_engine.vectors.torch_format import NotOnlyTensorsError, load


def saved(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def rewritten(data: bytes, change: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The archive with some members replaced (None: left out), by the end of their names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            content = next((value for end, value in change.items() if name.endswith(end)), old.read(name))
            if content is not None:
                new.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_are_those_of_torch(tmp_path: Path, dtype: torch.dtype, protocol: int) -> None:
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    tensors = {
        "whole": base,
        3: base[2],
        "view": base[1:5, ::2],
        "transposed": base.T,
        "scalar": base[0, 0],
        "empty": base[:0],
        "parameter": torch.nn.Parameter(base[0]),
    }
    for number, value in enumerate((tensors, base, base[4], OrderedDict(tensors))):
        path = tmp_path / f"{number}.pt"
        torch.save(value, path, pickle_protocol=protocol)
        found = load(path)
        given = value if isinstance(value, dict) else {"only": value}
        for key, tensor in given.items():
            array = found[key] if isinstance(value, dict) else found
            assert array.dtype == np.float32
            assert np.array_equal(array, tensor.detach().float().numpy())


def test_plain_values_are_returned(tmp_path: Path) -> None:
    torch.save({"text": "x", "list": [1, 2.5, None, True]}, tmp_path / "v.pt")
    assert load(tmp_path / "v.pt") == {"text": "x", "list": [1, 2.5, None, True]}


GOOD = saved({layer: torch.arange(8.0) for layer in range(3)})


def _many_puts() -> bytes:
    return b"\x80\x02}r\xff\xff\xff\x7f."


BAD: dict[str, tuple[bytes, str]] = {
    "expanded": (saved(torch.ones(1).expand(65536)), "shape [65536] is larger than its storage"),
    "expanded dict": (
        saved({layer: torch.ones(1).expand(1024, 65536) for layer in range(20)}),
        "shape [1024, 65536] is larger than its storage",
    ),
    "far": (saved(torch.ones(1).as_strided((1,), (2**62,))), "shape [1] is not a vector"),
    "wide": (saved(torch.ones(70_000)), "shape [70000] is not a vector"),
    "one storage many times": (
        saved(dict(enumerate([torch.ones(1024, 1024)] * 200))),
        "200 tensors of 838860800 bytes are more than any vector",
    ),
    "deflated": (rewritten(saved(torch.zeros(60_000)), {}, zipfile.ZIP_DEFLATED), "the archive is compressed"),
    "storage cut": (rewritten(saved(torch.ones(8)), {"data/0": b"\0" * 16}), "larger than its storage"),
    "storage of an odd size": (rewritten(saved(torch.ones(3)), {"data/0": b"\0" * 11}), "larger than its storage"),
    "no storage": (rewritten(saved(torch.ones(8)), {"data/0": None}), "a storage is missing"),
    "no pickle": (rewritten(saved(torch.ones(8)), {"data.pkl": None}), "exactly one data.pkl"),
    "big-endian": (rewritten(saved(torch.ones(8)), {"byteorder": b"big"}), "big-endian"),
    "memo bomb": (rewritten(GOOD, {"data.pkl": _many_puts()}), "damaged"),
    "long pickle": (rewritten(GOOD, {"data.pkl": b"\x80\x02" + b"N0" * 2**20}), "at most 1048576 are read"),
    "sparse": (saved(torch.eye(4).to_sparse()), "not dense"),
    "meta": (saved(torch.ones(4, device="meta")), "not dense"),
    "integers": (saved(torch.ones(4, dtype=torch.int64)), "a tensor of long; a floating-point"),
    "before PyTorch 1.6": (saved(torch.ones(4), _use_new_zipfile_serialization=False), "PyTorch 1.6 or newer"),
    "a number": (b"1" * 100, "not a file of torch.save"),
    "many members": (rewritten(saved([torch.ones(1) for _ in range(5000)]), {}), "at most 4096 are read"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_vector_is_one_line(tmp_path: Path, name: str) -> None:
    data, sentence = BAD[name]
    path = tmp_path / "v.pt"
    path.write_bytes(data)
    with pytest.raises(VectorFileError) as caught:
        load(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert sentence in caught.value.message
    assert len(caught.value.message) < len(str(path)) + 200


class Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("it ran",)


@pytest.mark.parametrize("value", [Exploit(), {1: Exploit()}, len, {"f": torch.load}, {1, 2}])
def test_code_is_refused(tmp_path: Path, value: object, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(value, tmp_path / "v.pt")
    with pytest.raises(NotOnlyTensorsError, match="could run any code"):
        load(tmp_path / "v.pt")
    assert "it ran" not in capsys.readouterr().out


LENS = {
    "activations": {"data": "AACAPwAAgD8=", "dtype": "float32", "original_dtype": "torch.float32", "shape": [1, 2]},
    "layer_indices": [1],
    "scale": 1.5,
}
FILES = {
    "caa": ("vec_layer_3_m.pt", saved(torch.arange(8.0))),
    "persona": ("evil_diff.pt", saved(torch.ones(5, 8).half())),
    "refusal": ("direction.pt", saved(torch.arange(8.0).double())),
    "layers": ("layers.pt", GOOD),
    "vllm-lens": ("lens.json", json.dumps(LENS).encode()),
}
"""A file of each kind that no server reads. GGUF files have their own tests."""


SEEDED = settings(
    max_examples=300, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(folder: Path, kind: str) -> Path:
    (folder / "direction_metadata.json").write_text('{"layer": 4}')
    name, data = FILES[kind]
    (folder / name).write_bytes(data)
    return folder / name


@SEEDED
@given(data=st.data())
def test_damaged_files_are_errors_of_one_line(tmp_path: Path, data: st.DataObject) -> None:
    path = write(tmp_path, kind := data.draw(st.sampled_from(sorted(FILES))))
    which = path.with_name("direction_metadata.json") if kind == "refusal" and data.draw(st.booleans()) else path
    which.write_bytes(data.draw(damaged(which.read_bytes())))
    expect_a_vector_or_one_line(path, kind)


@SEEDED
@given(data=st.data())
def test_damage_inside_an_archive_is_an_error_of_one_line(tmp_path: Path, data: st.DataObject) -> None:
    """The checksums of the archive fit, so that the damage reaches the unpickler."""
    path = write(tmp_path, kind := data.draw(st.sampled_from(("caa", "layers"))))
    with zipfile.ZipFile(path) as archive:
        text = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    path.write_bytes(rewritten(path.read_bytes(), {"data.pkl": data.draw(damaged(text))}))
    expect_a_vector_or_one_line(path, kind)


def expect_a_vector_or_one_line(path: Path, kind: str) -> None:
    began, message = time.monotonic(), ""
    try:
        assert import_vector(path, kind).hidden_size > 0
    except VectorFileError as error:
        message = error.message
    assert "\n" not in message
    assert len(message) < 2 * len(str(path)) + 400
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.timeout(20)
def test_special_files_are_refused(tmp_path: Path, kind: str, special: str) -> None:
    path = tmp_path / FILES.get(kind, ("v.gguf",))[0]
    (tmp_path / "direction_metadata.json").write_text('{"layer": 4}')
    SPECIAL[special](path)
    with pytest.raises(VectorFileError):
        import_vector(path, kind)


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.timeout(20)
def test_a_special_file_beside_a_direction_is_refused(tmp_path: Path, special: str) -> None:
    path = write(tmp_path, "refusal")
    (tmp_path / "direction_metadata.json").unlink()
    SPECIAL[special](tmp_path / "direction_metadata.json")
    with pytest.raises(VectorFileError, match="the layer is unknown"):
        import_vector(path, "refusal")


@pytest.mark.parametrize("name", ["expanded dict", "one storage many times", "deflated", "memo bomb"])
def test_small_files_take_little_memory(tmp_path: Path, name: str) -> None:
    """In a process of its own, whose memory is limited to 300 MiB more than its start."""
    path = tmp_path / "v.pt"
    data = rewritten(saved(torch.zeros(2**20, 64)), {}, zipfile.ZIP_DEFLATED) if name == "deflated" else BAD[name][0]
    path.write_bytes(data)
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom steer_engine.vectors.importers import import_vector\n"
        "from steer_engine.errors import VectorFileError\n"
        "before = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (before + 300 * 2**20,) * 2)\n"
        "try:\n    import_vector(sys.argv[1], 'layers')\nexcept VectorFileError as error:\n    print(error.message)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path}: ")
