"""The oracle: a Hugging Face model with forward hooks that does what a spec says, in plain torch.

Its algebra is written from the definitions of DESIGN (what an edit computes), not shared with the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from steer_engine.vectors import ControlVector


class Oracle:
    """Hugging Face model in float32 on one prompt at a time. T tokens, D hidden size, V vocabulary."""

    def __init__(self, path: str, vectors: Mapping[str, ControlVector]) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        self.vectors = vectors
        self.closest_gate = np.inf
        """How near any cosine came to the bound of its gate: too near, and rounding decides."""

    def logprobs(self, tokens: Sequence[int], spec: dict[str, Any] | None, prompt_len: int | None = None) -> np.ndarray:
        """float64 [T, V]: log-softmax at every position, the stream edited as `spec` says."""
        prompt_len = len(tokens) if prompt_len is None else prompt_len
        handles = []
        if spec is not None:
            blocks = self.model.model.layers
            for number, block in enumerate(blocks):
                handles.append(block.register_forward_hook(self._hook(number, spec, prompt_len)))
        try:
            with torch.inference_mode():
                logits_TV = self.model(torch.tensor([list(tokens)])).logits[0].double()
        finally:
            for handle in handles:
                handle.remove()
        result: np.ndarray = torch.log_softmax(logits_TV, dim=-1).numpy()
        return result

    def _hook(self, block: int, spec: dict[str, Any], prompt_len: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            stream = output[0] if isinstance(output, tuple) else output
            x_TD = self.edited(stream.reshape(-1, stream.shape[-1]), block, spec, prompt_len).reshape(stream.shape)
            return (x_TD, *output[1:]) if isinstance(output, tuple) else x_TD

        return hook

    def edited(self, x_TD: torch.Tensor, block: int, spec: dict[str, Any], prompt_len: int) -> torch.Tensor:
        """The stream after one block, edited in float64."""
        before_TD = x_TD.double()
        x_TD = before_TD.clone()
        touched_T = torch.zeros(len(x_TD), dtype=torch.bool)
        for edit in spec["edits"]:
            vector = self.vectors[edit["vector"]]
            wanted = edit.get("blocks", "all")
            chosen = vector.blocks if wanted == "all" else _blocks(wanted)
            if block not in chosen:
                continue
            covered_T = _covered(edit.get("scope", "all"), len(x_TD), prompt_len)
            covered_T &= self._gate_open(edit, x_TD, block)
            v_D = torch.tensor(vector.directions[block].tolist(), dtype=torch.float64)
            if edit.get("unit") == "residual":
                v_D = vector.metadata.residual_norms[block] * v_D / v_D.norm()
            x_TD = torch.where(covered_T[:, None], _apply(edit, x_TD, v_D), x_TD)
            touched_T |= covered_T
        if spec.get("preserve_norm"):
            rescaled_TD = x_TD * before_TD.norm(dim=1, keepdim=True) / x_TD.norm(dim=1, keepdim=True)
            x_TD = torch.where(touched_T[:, None], rescaled_TD, x_TD)
        return x_TD.float()

    def _gate_open(self, edit: dict[str, Any], x_TD: torch.Tensor, block: int) -> torch.Tensor:
        gate = edit.get("gate")
        if gate is None:
            return torch.ones(len(x_TD), dtype=torch.bool)
        g_D = torch.tensor(self.vectors[gate["vector"]].directions[block].tolist(), dtype=torch.float64)
        cos_T = (x_TD @ g_D) / (x_TD.norm(dim=1) * g_D.norm())
        for bound in (gate.get("min_cos"), gate.get("max_cos")):
            if bound is not None:
                self.closest_gate = min(self.closest_gate, float((cos_T - bound).abs().min()))
        return (cos_T >= gate.get("min_cos", -2.0)) & (cos_T <= gate.get("max_cos", 2.0))


def _apply(edit: dict[str, Any], x_TD: torch.Tensor, v_D: torch.Tensor) -> torch.Tensor:
    scale, unit_D = edit.get("scale", 1.0), v_D / v_D.norm()
    along_T1 = (x_TD @ unit_D)[:, None]
    match edit.get("op", "add"):
        case "add":
            return x_TD + scale * v_D
        case "add_relative":
            return x_TD + scale * x_TD.norm(dim=1, keepdim=True) * unit_D
        case "ablate":
            return x_TD - scale * along_T1 * unit_D
        case "clamp":
            held_T1 = along_T1.clamp(edit.get("lo"), edit.get("hi"))
            return x_TD + (held_T1 - along_T1) * unit_D
        case "set":
            return x_TD + (edit["target"] - along_T1) * unit_D
    raise AssertionError(edit)


def _blocks(wanted: str | int | list[int]) -> list[int]:
    if isinstance(wanted, str):
        first, _, last = wanted.partition("-")
        return list(range(int(first), int(last or first) + 1))
    return [wanted] if isinstance(wanted, int) else wanted


def _covered(scope: str | dict[str, int | None], num_tokens: int, prompt_len: int) -> torch.Tensor:
    positions_T = torch.arange(num_tokens)
    if isinstance(scope, dict):
        start, end = scope.get("start"), scope.get("end")
        first = 0 if start is None else start if start >= 0 else max(0, prompt_len + start)
        last = num_tokens if end is None else end if end >= 0 else max(0, prompt_len + end)
        return (positions_T >= first) & (positions_T < last)
    if scope == "prompt":
        return positions_T < prompt_len
    if scope == "generation":
        return positions_T >= prompt_len - 1
    return positions_T >= 0
