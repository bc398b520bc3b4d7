"""The oracle: a Hugging Face model with forward hooks that does what a spec says, in plain torch.

Its algebra is written from the definitions of DESIGN (what an edit computes), not shared with the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from helpers.oracle_when import Decisions, covered, share
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
        return self._run(tokens, [] if spec is None else self._edits(tokens, spec, prompt_len))

    def _edits(
        self,
        tokens: Sequence[int],
        spec: dict[str, Any],
        prompt_len: int,
        recorded: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> list[Any]:
        """A hook per block that edits as `spec` says, and adds to `recorded`."""
        decisions = None
        if "when" in spec or any("when" in edit for edit in spec["edits"]):
            # Over the prompt alone: a decision is made while its last token is computed.
            decisions = self.decisions(tokens, spec, prompt_len)
        return self._hooks(spec, tokens, prompt_len, decisions, recorded=recorded)

    def streams(
        self, tokens: Sequence[int], spec: dict[str, Any] | None, prompt_len: int | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """By block, the stream [T, D] before and after its edits."""
        prompt_len = len(tokens) if prompt_len is None else prompt_len
        recorded: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._run(tokens, self._edits(tokens, {"edits": []} if spec is None else spec, prompt_len, recorded))
        return recorded

    def decisions(self, tokens: Sequence[int], spec: dict[str, Any], prompt_len: int) -> Decisions:
        """What the conditions of a spec measure in the prompt."""
        decisions = Decisions(spec, prompt_len)
        self._run(tokens[:prompt_len], self._hooks(spec, tokens[:prompt_len], prompt_len, decisions, measure=True))
        return decisions

    def _run(self, tokens: Sequence[int], hooks: Sequence[Any]) -> np.ndarray:
        """With a hook per block."""
        handles = [
            block.register_forward_hook(hook) for block, hook in zip(self.model.model.layers, hooks, strict=False)
        ]
        try:
            with torch.inference_mode():
                logits_TV = self.model(torch.tensor([list(tokens)])).logits[0].double()
        finally:
            for handle in handles:
                handle.remove()
        result: np.ndarray = torch.log_softmax(logits_TV, dim=-1).numpy()
        return result

    def _hooks(
        self,
        spec: dict[str, Any],
        tokens: Sequence[int],
        prompt_len: int,
        decisions: Decisions | None,
        *,
        measure: bool = False,
        recorded: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> list[Any]:
        def hook_of(block: int) -> Any:
            def hook(module: Any, args: Any, output: Any) -> Any:
                stream = output[0] if isinstance(output, tuple) else output
                x_TD = stream.reshape(-1, stream.shape[-1])
                if measure and decisions is not None:
                    decisions.measure(x_TD, block, self.vectors)
                edited_TD = self.edited(x_TD, block, spec, tokens, prompt_len, decisions)
                if recorded is not None:
                    recorded.append((x_TD, edited_TD))
                x_TD = edited_TD.reshape(stream.shape)
                return (x_TD, *output[1:]) if isinstance(output, tuple) else x_TD

            return hook

        return [hook_of(block) for block in range(len(self.model.model.layers))]

    def edited(
        self,
        x_TD: torch.Tensor,
        block: int,
        spec: dict[str, Any],
        tokens: Sequence[int],
        prompt_len: int,
        decisions: Decisions | None = None,
    ) -> torch.Tensor:
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
            covered_T, first_T = covered(edit.get("scope", "all"), tokens, prompt_len)
            covered_T &= self._gate_open(edit, x_TD, block)
            when = decisions.when_of(edit) if decisions is not None else None
            if when is not None and decisions is not None:
                early = block > decisions.decided_at(when, self.vectors)
                covered_T &= torch.arange(len(x_TD)) >= (prompt_len - 1 if early else prompt_len)
                if bool(covered_T.any()):
                    covered_T &= decisions.holds(when)
            share_T = share(edit.get("schedule"), torch.arange(len(x_TD)) - first_T)
            covered_T &= share_T != 0
            v_D = torch.tensor(vector.directions[block].tolist(), dtype=torch.float64)
            if edit.get("unit") == "residual":
                v_D = vector.metadata.residual_norms[block] * v_D / v_D.norm()
            change_TD = _apply(edit, x_TD, v_D) - x_TD
            x_TD = torch.where(covered_T[:, None], x_TD + share_T[:, None] * change_TD, x_TD)
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


def stacked(streams: Sequence[tuple[torch.Tensor, torch.Tensor]], *, after: bool = False) -> np.ndarray:
    """float32 [L, T, D]: what `Oracle.streams` recorded before the edits of each block, or `after` them."""
    return np.stack([pair[after].numpy() for pair in streams])


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
