"""Makes files with SAELens and pyreft themselves, and reads ours with them. Run by test_tools_themselves.py.

    tool_files.py make FOLDER     autoencoders and interventions, each with inputs and what the tool computes from them
    tool_files.py read FOLDER     what the tools compute from the files `ours` beside them

It runs in an environment of the tools' own, without this project.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

D, F, K = 16, 40, 3
BLOCKS = (1, 2)


def inputs() -> torch.Tensor:
    return torch.randn(64, D, generator=torch.Generator().manual_seed(5))


def make_autoencoders(folder: Path) -> None:
    sae_lens, base = import_module("sae_lens"), import_module("sae_lens.saes.sae")
    for name in ("Standard", "JumpReLU", "Gated", "TopK"):
        for subtracted in (True, False):
            about = base.SAEMetadata(model_name="gpt2-small", hook_name="blocks.3.hook_resid_post")
            config = getattr(sae_lens, f"{name}SAEConfig")(
                d_in=D, d_sae=F, apply_b_dec_to_input=subtracted, metadata=about, **({"k": 4} if name == "TopK" else {})
            )
            sae = getattr(sae_lens, f"{name}SAE")(config)
            with torch.no_grad():
                for tensor_name, tensor in sae.named_parameters():
                    random = torch.rand(tensor.shape) if tensor_name == "threshold" else torch.randn(tensor.shape) / 2
                    tensor.copy_(random)
                sae.save_model(folder / f"{name}-{subtracted}")
                save(folder / f"{name}-{subtracted}", sae.encode(inputs()))


def make_interventions(folder: Path) -> None:
    pyreft = import_module("pyreft")
    for name in ("Loreft", "Noreft", "Nodireft"):
        kind = getattr(pyreft, f"{name}Intervention")
        arguments = {"embed_dim": D, "low_rank_dimension": K, "dtype": torch.float32, "add_bias": True}
        representations = [
            {"layer": block, "component": "block_output", "low_rank_dimension": K, "intervention": kind(**arguments)}
            for block in BLOCKS
        ]
        model = pyreft.get_reft_model(llama(), pyreft.ReftConfig(representations=representations))
        model.save(str(folder / name))
        save(folder / name, computed(model))


def llama() -> Any:
    transformers = import_module("transformers")
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 50}
    config = transformers.LlamaConfig(hidden_size=D, intermediate_size=2 * D, **sizes)
    return transformers.LlamaForCausalLM(config)


def computed(model: Any) -> torch.Tensor:
    """What each intervention makes of the inputs, `[blocks, N, D]`."""
    model.set_device("cpu")
    with torch.no_grad():
        return torch.stack([intervention(inputs()[None])[0] for intervention in model.interventions.values()])


def save(folder: Path, result: torch.Tensor) -> None:
    (folder / "expected.json").write_text(json.dumps({"x": inputs().tolist(), "result": result.tolist()}))


def read(folder: Path) -> None:
    sae_lens, pyreft = import_module("sae_lens"), import_module("pyreft")
    for name in ("Standard", "JumpReLU", "Gated"):
        for subtracted in (True, False):
            here = folder / f"{name}-{subtracted}" / "ours"
            with torch.no_grad():
                save(here, sae_lens.SAE.load_from_disk(here).encode(inputs()))
    here = folder / "Loreft" / "ours"
    model = pyreft.ReftModel.load(str(here), llama())
    for key in model.interventions:  # loaded ones are in bfloat16, whatever the file has
        intervention = pyreft.LoreftIntervention(embed_dim=D, low_rank_dimension=K, dtype=torch.float32)
        intervention.load_state_dict(torch.load(here / f"intkey_{key}.bin"))
        model.interventions[key] = intervention
    save(here, computed(model))


if __name__ == "__main__":
    torch.manual_seed(0)
    command, where = sys.argv[1], Path(sys.argv[2])
    if command == "make":
        make_autoencoders(where)
        make_interventions(where)
    else:
        read(where)
