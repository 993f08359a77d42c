"""A second opinion on the sparse path: Hugging Face's OPT replays what an engine did, step by step, masks and
all.

Nothing of `vllm_dejavu` is imported: the artifact's files are read raw, scores, union and masks are written
here again, attention and the order of the blocks are Hugging Face's own. Float64, so that what differs is the
engine's error.

How a step is replayed: all its tokens form one flat sequence [1, T]. Keys and values live in a store keyed by
the physical cache slot the engine used; Hugging Face's attention gets, for every layer, the slots that some
token of the step may see, and a mask [T, slots] that says which token sees which. So prefix-cache hits,
preemption with recomputation and chunked prefill are replayed without knowing about them. Slots never written
hold NaN.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from engine import Step
from safetensors.torch import load_file
from transformers import OPTForCausalLM

# Scores nearer to 0 than this may come out with the other sign in the engine's float32. In units of their
# spread where that is above 1: integers' scores have any scale.
NEAR_ZERO = 1e-4


@dataclass
class Replayed:
    """What the replay found.

    Attributes:
        log_probs: one [requests, vocab] a step, of each request's last token.
        checked: selections compared. flips: those that differ with a score nearer to 0 than NEAR_ZERO.
        wrong: (step, layer, block, row, unit, score) of those that differ otherwise.
        counts: (layer, block) -> what the gate's counters should hold over its sparse steps: rows, selected,
            read (union), survived (neurons of the union that came out positive in some row), active (truly),
            hit.
    """

    log_probs: list[torch.Tensor] = field(default_factory=list)
    checked: int = 0
    flips: int = 0
    wrong: list[tuple] = field(default_factory=list)
    counts: dict[tuple[int, str], Counter] = field(default_factory=dict)

    def tokens(self, steps: list[Step]) -> dict[str, dict[int, int]]:
        """Request -> position -> greedy choice for that position, as first computed."""
        out: dict[str, dict[int, int]] = {}
        for step, log_probs in zip(steps, self.log_probs, strict=True):
            for request, length, row in zip(step.requests, step.seq_lens, log_probs, strict=True):
                out.setdefault(request, {}).setdefault(length, int(row.argmax()))
        return out


class _PagedStore:
    """Stands in for Hugging Face's cache: keys and values of every layer by physical slot."""

    def __init__(self, layers: int, heads: int, slots: int, head_size: int):
        self.keys, self.values = (
            torch.full((layers, heads, slots, head_size), torch.nan, dtype=torch.float64) for _ in "kv"
        )
        # of the current step: slots of its tokens; slots any of them sees
        self.written = self.seen = torch.tensor([])

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys[layer][:, self.written], self.values[layer][:, self.written] = key[0], value[0]
        return self.keys[layer][None, :, self.seen], self.values[layer][None, :, self.seen]

    def get_seq_length(self, *_: Any) -> int:
        return 0  # positions are given


class Replay:
    """A masked Hugging Face OPT.

    Args:
        artifact: directory of the predictors, to check the engine's selections against; None checks none.
        row_exact: each row keeps only its own neurons, instead of the union of the batch.
        oracle: the engine should select what is truly active: positive neurons, heads above the artifact's
            threshold.
    """

    def __init__(
        self, model: Path, artifact: Path | None = None, *, row_exact: bool = False, oracle: bool = False
    ):
        self.model = OPTForCausalLM.from_pretrained(
            model, dtype=torch.float64, attn_implementation="eager"
        ).eval()
        self.config, self.row_exact, self.oracle = self.model.config, row_exact, oracle
        self.gates, self.thresholds = {}, {}
        if artifact is not None:
            manifest = json.loads((artifact / "dejavu.json").read_text())
            tensors = {k: v.double() for k, v in load_file(artifact / "predictors.safetensors").items()}
            for layer, blocks in enumerate(manifest["layers"]):
                for block, spec in blocks.items():
                    if spec["state"] == "sparse":
                        prefix = f"layers.{layer}.{block}."
                        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                        self.gates[layer, block] = spec["lookahead"], own
                        self.thresholds[layer] = spec["threshold"] if block == "attention" else None
        self._hook()

    def _hook(self) -> None:
        pre_ln = self.config.do_layer_norm_before
        for i, layer in enumerate(self.model.model.decoder.layers):

            def see(name: str, i: int = i):
                return lambda module, args, *_: self.seen.__setitem__(
                    (i, name), args[0].reshape(-1, args[0].shape[-1])
                )

            layer.self_attn.q_proj.register_forward_pre_hook(see("attn_input"))
            layer.fc1.register_forward_pre_hook(see("mlp_input"))
            # the residual stream in front of the MLP block: before its LayerNorm if the norm comes first
            (layer.final_layer_norm if pre_ln else layer.fc1).register_forward_pre_hook(see("residual"))
            layer.fc1.register_forward_hook(
                lambda module, args, out, i=i: self.seen.__setitem__((i, "fc1"), out)
            )
            layer.self_attn.out_proj.register_forward_pre_hook(
                lambda module, args, i=i: self._mask_heads(i, args[0])
            )
            layer.fc2.register_forward_pre_hook(lambda module, args, i=i: self._mask_neurons(i, args[0]))

    def _mask_heads(self, layer: int, attn: torch.Tensor) -> torch.Tensor:
        mask = self._mask(layer, "attention")
        if mask is None:
            return attn
        heads = attn[0].unflatten(-1, (self.config.num_attention_heads, -1))  # [T, heads, head_size]
        if (layer, "attention") in self.gates:
            weight = self.model.model.decoder.layers[layer].self_attn.out_proj.weight.unflatten(
                1, heads.shape[1:]
            )
            above = torch.einsum("thd,ohd->tho", heads, weight).norm(dim=-1) - self.thresholds[layer]
            self._check(
                layer, "attention", mask, above if self.oracle else self.scores(layer, "attention"), above > 0
            )
        return torch.where(mask[:, :, None], heads, 0.0).flatten(1)[None]

    def _mask_neurons(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        mask = self._mask(layer, "mlp")
        if mask is None:
            return h
        fc1 = self.seen[layer, "fc1"]
        if (layer, "mlp") in self.gates:
            self._check(layer, "mlp", mask, fc1 if self.oracle else self.scores(layer, "mlp"), fc1 > 0)
        h = torch.where(mask if self.row_exact else mask.any(dim=0), h, 0.0)
        self.out.counts[layer, "mlp"]["survived"] += int((h > 0).any(dim=0).sum())
        return h

    def _mask(self, layer: int, block: str) -> torch.Tensor | None:
        """The engine's mask [T, units] of a block in this step, None where it ran dense."""
        recorded = self.step.gates.get((layer, block))
        if recorded is None:
            return None
        mask, valid = recorded
        assert bool(valid.all()) and mask.shape[0] == self.step.input_ids.shape[0], "these engines do not pad"
        counts = self.out.counts.setdefault((layer, block), Counter())
        counts.update(steps=1, rows=mask.shape[0], selected=int(mask.sum()), read=int(mask.any(dim=0).sum()))
        return mask

    def _check(
        self, layer: int, block: str, mask: torch.Tensor, scores: torch.Tensor, active: torch.Tensor
    ) -> None:
        self.out.counts[layer, block].update(active=int(active.sum()), hit=int((active & mask).sum()))
        self.out.checked += mask.numel()
        near = NEAR_ZERO * max(1.0, float(scores.std(correction=0)))
        for row, unit in ((scores > 0) != mask).nonzero().tolist():
            score = float(scores[row, unit])
            if abs(score) < near:
                self.out.flips += 1
            else:
                self.out.wrong.append((self.number, layer, block, row, unit, score))

    def scores(self, layer: int, block: str) -> torch.Tensor:
        """Scores [T, units] of a gate from the hidden states of this replay."""
        lookahead, t = self.gates[layer, block]
        if lookahead == "previous":
            x = self.seen[layer - 1, "residual"]
        elif lookahead == "attn_input" or block == "attention":
            x = self.seen[layer, "attn_input"]
        else:
            x = self.seen[layer, "mlp_input"]
        return (x @ t["down"].T @ t["up"].T if block == "mlp" else x @ t["weight"].T) + t["bias"]

    @torch.no_grad()
    def run(self, steps: list[Step]) -> Replayed:
        """Replay a recorded schedule from an empty cache."""
        c, self.out = self.config, Replayed()
        slots = 1 + max(int(s.block_table.max()) for s in steps)
        store = _PagedStore(
            c.num_hidden_layers,
            c.num_attention_heads,
            slots * steps[0].block_size,
            c.hidden_size // c.num_attention_heads,
        )
        for self.number, self.step in enumerate(steps):
            self.seen: dict[tuple[int, str], torch.Tensor] = {}
            hidden = self.model.model(
                input_ids=self.step.input_ids[None].long(),
                position_ids=self.step.positions[None].long(),
                attention_mask=self._place(store),
                past_key_values=store,
                use_cache=True,
            ).last_hidden_state[0]
            last = [end - 1 for end in self.step.query_start_loc[1:]]
            self.out.log_probs.append(self.model.lm_head(hidden[last]).log_softmax(-1))
        return self.out

    def _place(self, store: _PagedStore) -> torch.Tensor:
        """Tell the store this step's slots; returns the additive mask [1, 1, T, slots seen]."""
        step = self.step
        visible = []  # per token: the slots of its request at positions 0 .. its own
        for row, (start, end) in enumerate(zip(step.query_start_loc, step.query_start_loc[1:], strict=False)):
            for token in range(start, end):
                p = torch.arange(int(step.positions[token]) + 1)
                visible.append(
                    step.block_table[row, p // step.block_size].long() * step.block_size + p % step.block_size
                )
        store.written = torch.stack([v[-1] for v in visible])
        assert torch.equal(store.written, step.slot_mapping.long()), (
            "the engine wrote to slots its block table does not name"
        )
        store.seen = torch.unique(torch.cat(visible))
        mask = torch.full(
            (len(visible), len(store.seen)), torch.finfo(torch.float64).min, dtype=torch.float64
        )
        for token, v in enumerate(visible):
            mask[token, torch.searchsorted(store.seen, v)] = 0.0
        return mask[None, None]
