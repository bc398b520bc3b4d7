"""`python -m steer_engine.gguf_checkpoint SOURCE.gguf FOLDER`: unpack a GGUF model into a normal bfloat16 checkpoint.

Runs as a child of `steer_engine.models`, which makes the result atomic. Needs `gguf` and `accelerate`.
"""

from __future__ import annotations

import sys
from pathlib import Path


def convert(source: Path, folder: Path) -> None:
    """Write weights, configuration and tokenizer of `source` to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(**where, quantization_config=GgufConfig(dequantize=True))
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
