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
from safetensors.numpy import save as save_safetensors

from steer_engine.errors import VectorFileError
from steer_engine.vectors.importers import KINDS, Choice, import_vector
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


LITE = {"method": "mean_diff", "layers": [3], "target": "residual", "target_submodule": None, "coeff": 2.5}
LITE_CFG = {"cfg": json.dumps(LITE)}
NEURONPEDIA = {
    "modelId": "gpt2-small",
    "hookName": "blocks.6.hook_resid_pre",
    "vector": [0.5, -1.25, 3],
    "vectorLabel": "Jedi",
    "vectorDefaultSteerStrength": 15,
}
SAELENS = {
    "architecture": "jumprelu",
    "d_in": 4,
    "d_sae": 9,
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "metadata": {"model_name": "gpt2-small", "hook_name": "blocks.3.hook_resid_post"},
}
SAE = {"W_enc": (4, 9), "W_dec": (9, 4), "b_enc": (9,), "b_dec": (4,), "threshold": (9,)}
WEIGHTS = {name: np.ones(shape, np.float32) for name, shape in SAE.items()}
LOREFT = {"weight": torch.ones(2, 6), "bias": torch.zeros(2), "rotate_layer": torch.eye(6)[:, :2].contiguous()}
REFT = {
    "representations": [[4, "block_output", "pos", 1, 2, *[None] * 9]],
    "intervention_types": ["<class 'pyreft.interventions.LoreftIntervention'>"],
    "mode": "parallel",
    "sorted_keys": [],
}
CONCEPT = "comp_model_layers[20]_output_unit_pos_nunit_1#0"
FILES: dict[str, dict[str, bytes]] = {
    "caa": {"vec_layer_3_m.pt": saved(torch.arange(8.0))},
    "persona": {"evil_diff.pt": saved(torch.ones(5, 8).half())},
    "refusal": {"direction.pt": saved(torch.arange(8.0).double()), "direction_metadata.json": b'{"layer": 4}'},
    "layers": {"layers.pt": GOOD},
    "vllm-lens": {"lens.json": json.dumps(LENS).encode()},
    "neuronpedia": {"vector.json": json.dumps({"vector": NEURONPEDIA}).encode()},
    "steering-lite": {"v.safetensors": save_safetensors({"layer3.v": np.ones(4, np.float32)}, LITE_CFG)},
    "saelens": {
        "cfg.json": json.dumps(SAELENS).encode(),
        "sae_weights.safetensors": save_safetensors(WEIGHTS),
    },
    "reft": {
        "config.json": json.dumps(REFT).encode(),
        "intkey_layer_4_comp_block_output_unit_pos_nunit_1#0.bin": saved(LOREFT),
    },
    "axbench": {
        "LoReFT_weight.pt": saved(
            {
                f"{CONCEPT}.proj_weight": torch.eye(6)[:, :2].expand(3, 6, 2).contiguous(),
                f"{CONCEPT}.source_weight": torch.ones(3, 6, 2),
            }
        ),
        "LoReFT_bias.pt": saved({f"{CONCEPT}.bias": torch.ones(3, 2)}),
    },
}
"""The files of each kind that no server reads. The first is the one to import, if not the whole folder is. GGUF files
and the arrays of gemma-scope have their own tests."""

FOLDERS = ("saelens", "reft")
CHOICES = {"saelens": Choice(features=(2, 5)), "axbench": Choice(features=(1,))}


SEEDED = settings(
    max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(folder: Path, kind: str) -> Path:
    for name, data in FILES[kind].items():
        (folder / name).write_bytes(data)
    return folder if kind in FOLDERS else folder / next(iter(FILES[kind]))


def test_undamaged_files_are_read(tmp_path: Path) -> None:
    sizes = {}
    for kind in FILES:
        (tmp_path / kind).mkdir()
        sizes[kind] = import_vector(write(tmp_path / kind, kind), kind, choice=CHOICES.get(kind)).hidden_size
    assert list(sizes.values()) == [8, 8, 8, 8, 2, 3, 4, 4, 6, 6], sizes


@pytest.mark.parametrize("kind", FILES)
@SEEDED
@given(data=st.data())
def test_damaged_files_are_errors_of_one_line(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    path = write(tmp_path, kind)
    which = tmp_path / data.draw(st.sampled_from(sorted(FILES[kind])))
    which.write_bytes(data.draw(damaged(which.read_bytes())))
    expect_a_vector_or_one_line(path, kind)


@SEEDED
@given(data=st.data())
def test_damage_inside_an_archive_is_an_error_of_one_line(tmp_path: Path, data: st.DataObject) -> None:
    """The checksums of the archive fit, so that the damage reaches the unpickler."""
    path = write(tmp_path, kind := data.draw(st.sampled_from(("caa", "layers", "reft", "axbench"))))
    which = tmp_path / next(name for name in FILES[kind] if name.endswith((".pt", ".bin")))
    with zipfile.ZipFile(which) as archive:
        text = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    which.write_bytes(rewritten(which.read_bytes(), {"data.pkl": data.draw(damaged(text))}))
    expect_a_vector_or_one_line(path, kind)


JSON_OF = {
    "vllm-lens": ("lens.json", LENS),
    "neuronpedia": ("vector.json", NEURONPEDIA),
    "saelens": ("cfg.json", SAELENS),
    "reft": ("config.json", REFT),
}
ODD = st.sampled_from(
    [None, True, -1, 10**400, 1e308, "", "x" * 5_000, "\ud800", "a\nb", [], [[]], {}, {"a": 1}, [10**400], "1" * 5_000]
)


@SEEDED
@given(data=st.data())
def test_odd_values_in_a_configuration_are_errors_of_one_line(tmp_path: Path, data: st.DataObject) -> None:
    """Valid JSON of the wrong kinds, sizes and characters, one to three times, at any depth."""
    kind = data.draw(st.sampled_from(sorted(JSON_OF)))
    path = write(tmp_path, kind)
    name, good = JSON_OF[kind]
    content = json.loads(json.dumps(good))
    for _ in range(data.draw(st.integers(1, 3))):
        place = content
        while True:
            keys = list(range(len(place))) if isinstance(place, list) else sorted(place)
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if not isinstance(place[key], dict | list) or data.draw(st.booleans()):
                place[key] = json.loads(json.dumps(data.draw(ODD)))
                break
            place = place[key]
    (tmp_path / name).write_text(json.dumps(content))
    expect_a_vector_or_one_line(path, kind)


def expect_a_vector_or_one_line(path: Path, kind: str) -> None:
    began, message = time.monotonic(), ""
    try:
        assert import_vector(path, kind, choice=CHOICES.get(kind)).hidden_size > 0
    except VectorFileError as error:
        message = error.message
    assert "\n" not in message
    assert len(message) < 2 * len(str(path)) + 400
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.timeout(20)
def test_special_files_are_refused(tmp_path: Path, kind: str, special: str) -> None:
    names = [] if kind in FOLDERS else list(FILES.get(kind, ()))
    for name in names[1:]:
        (tmp_path / name).write_bytes(FILES[kind][name])
    path = tmp_path / (names[0] if names else "v.gguf")
    SPECIAL[special](path)
    with pytest.raises(VectorFileError):
        import_vector(path, kind, choice=CHOICES.get(kind))


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, files in FILES.items() if len(files) > 1 for name in files]
)
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.timeout(20)
def test_a_special_file_among_several_is_refused(tmp_path: Path, kind: str, name: str, special: str) -> None:
    path = write(tmp_path, kind)
    (tmp_path / name).unlink()
    SPECIAL[special](tmp_path / name)
    with pytest.raises(VectorFileError) as refused:
        import_vector(path, kind, choice=CHOICES.get(kind))
    if name == "direction_metadata.json":
        assert "the layer is unknown" in refused.value.message


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
