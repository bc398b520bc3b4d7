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
from steer_engine.vectors import ControlVector, RowSet


class Oracle:
    """Hugging Face model in float32 on one prompt at a time. T tokens, D hidden size, V vocabulary."""

    def __init__(
        self, path: str, vectors: Mapping[str, ControlVector], row_sets: Mapping[str, RowSet] | None = None
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        self.vectors = vectors
        self.row_sets = row_sets or {}
        self.closest_gate = np.inf
        """How near any number came to the bound of its gate or of its feature: too near, and rounding decides."""

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
        recorded_site: str = "block",
    ) -> list[Any]:
        """A hook per point that edits as `spec` says, and adds to `recorded` at one site."""
        decisions = None
        if "when" in spec or any("when" in edit for edit in spec["edits"]):
            # Over the prompt alone: a decision is made while its last token is computed.
            decisions = self.decisions(tokens, spec, prompt_len)
        return self._hooks(spec, tokens, prompt_len, decisions, recorded=recorded, recorded_site=recorded_site)

    def streams(
        self, tokens: Sequence[int], spec: dict[str, Any] | None, prompt_len: int | None = None, site: str = "block"
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """By block, the stream, or the output of another site, [T, D] before and after its edits."""
        prompt_len = len(tokens) if prompt_len is None else prompt_len
        recorded: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._run(tokens, self._edits(tokens, {"edits": []} if spec is None else spec, prompt_len, recorded, site))
        return recorded

    def decisions(self, tokens: Sequence[int], spec: dict[str, Any], prompt_len: int) -> Decisions:
        """What the conditions of a spec measure in the prompt."""
        decisions = Decisions(spec, prompt_len)
        self._run(tokens[:prompt_len], self._hooks(spec, tokens[:prompt_len], prompt_len, decisions, measure=True))
        return decisions

    def _run(self, tokens: Sequence[int], hooks: Sequence[Any]) -> np.ndarray:
        """With a hook per point: the blocks, their attentions, their MLPs."""
        layers = self.model.model.layers
        modules = [*layers, *(layer.self_attn for layer in layers), *(layer.mlp for layer in layers)]
        handles = [module.register_forward_hook(hook) for module, hook in zip(modules, hooks, strict=False)]
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
        recorded_site: str = "block",
    ) -> list[Any]:
        def hook_of(block: int, site: str) -> Any:
            def hook(module: Any, args: Any, output: Any) -> Any:
                stream = output[0] if isinstance(output, tuple) else output
                x_TD = stream.reshape(-1, stream.shape[-1])
                if measure and decisions is not None:
                    decisions.measure(x_TD, block, self.vectors, site)
                edited_TD = self.edited(x_TD, block, spec, tokens, prompt_len, decisions, site)
                if recorded is not None and site == recorded_site:
                    recorded.append((x_TD, edited_TD))
                x_TD = edited_TD.reshape(stream.shape)
                return (x_TD, *output[1:]) if isinstance(output, tuple) else x_TD

            return hook

        blocks, sites = range(len(self.model.model.layers)), ("block", "attn", "mlp")
        return [hook_of(block, site) for site in sites for block in blocks]

    def edited(
        self,
        x_TD: torch.Tensor,
        block: int,
        spec: dict[str, Any],
        tokens: Sequence[int],
        prompt_len: int,
        decisions: Decisions | None = None,
        site: str = "block",
    ) -> torch.Tensor:
        """The stream after one block, or the output of its attention or MLP, edited in float64."""
        before_TD = x_TD.double()
        x_TD = before_TD.clone()
        touched_T = torch.zeros(len(x_TD), dtype=torch.bool)
        for edit in spec["edits"]:
            rows = self.row_sets.get(edit["vector"])
            vector = rows or self.vectors[edit["vector"]]
            wanted = edit.get("blocks", "all")
            chosen = vector.blocks if wanted == "all" else _blocks(wanted)
            if block not in chosen or edit.get("site", "block") != site:
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
            if isinstance(vector, RowSet):
                change_TD = self._change_by_rows(edit, vector, x_TD, block)
            elif edit.get("op") == "rotate":
                pair = [_float64(self.vectors[edit[name]].directions[block]) for name in ("vector", "toward")]
                change_TD = _rotated(edit, x_TD, *pair) - x_TD
            else:
                v_D = _float64(vector.directions[block])
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
        if "feature" in gate:
            row = self.row_sets[gate["vector"]].row(block, gate["feature"])
            number_T = x_TD @ _float64(row.read) + row.bias
        else:
            g_D = _float64(self.vectors[gate["vector"]].directions[block])
            number_T = x_TD @ g_D
            if "min_cos" in gate or "max_cos" in gate:
                number_T = number_T / (x_TD.norm(dim=1) * g_D.norm())
        low, high = (gate.get(f"{side}_cos", gate.get(f"{side}_dot")) for side in ("min", "max"))
        for bound in (low, high):
            if bound is not None:
                self.closest_gate = min(self.closest_gate, float((number_T - bound).abs().min()))
        return (number_T >= (-np.inf if low is None else low)) & (number_T <= (np.inf if high is None else high))

    def _change_by_rows(self, edit: dict[str, Any], rows: RowSet, x_TD: torch.Tensor, block: int) -> torch.Tensor:
        """What an edit of features or ranks adds. Features: decode what the change of the activations encodes."""
        if edit["op"] == "low_rank":
            w_KD, r_KD = _float64(rows.read[block]), _float64(rows.write[block])
            return edit.get("scale", 1.0) * (x_TD @ w_KD.T + _float64(rows.bias[block]) - x_TD @ r_KD.T) @ r_KD
        change_TD = torch.zeros_like(x_TD)
        numbers = edit["feature"] if isinstance(edit["feature"], list) else [edit["feature"]]
        for row in (rows.row(block, number) for number in numbers):
            before_T = x_TD @ _float64(row.read) + row.bias
            least = row.threshold or 0.0
            self.closest_gate = min(self.closest_gate, float((before_T - least).abs().min()))
            old_T = torch.where(before_T > least, before_T.clamp(min=0.0), 0.0)
            new_T = old_T + edit["add"] if "add" in edit else edit.get("scale", 1.0) * old_T
            if "target" in edit:
                new_T = torch.full_like(old_T, edit["target"])
            change_TD += (new_T - old_T)[:, None] * _float64(row.write)
        return change_TD


def stacked(streams: Sequence[tuple[torch.Tensor, torch.Tensor]], *, after: bool = False) -> np.ndarray:
    """float32 [L, T, D]: what `Oracle.streams` recorded before the edits of each block, or `after` them."""
    return np.stack([pair[after].numpy() for pair in streams])


def _float64(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float64))


def _rotated(edit: dict[str, Any], x_TD: torch.Tensor, v_D: torch.Tensor, toward_D: torch.Tensor) -> torch.Tensor:
    """With a complex number for the place in the plane."""
    u_D = v_D / v_D.norm()
    w_D = toward_D - (toward_D @ u_D) * u_D
    w_D = w_D / w_D.norm()
    place_T = torch.complex(x_TD @ u_D, x_TD @ w_D)
    if "degrees" in edit:
        new_T = place_T * np.exp(1j * np.radians(edit["degrees"]))
    else:
        new_T = place_T.abs() * np.exp(1j * np.radians(edit["to_degrees"]))
    moved_T = new_T - place_T
    return x_TD + moved_T.real[:, None] * u_D + moved_T.imag[:, None] * w_D


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
