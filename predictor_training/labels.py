"""What predictors are trained to catch: active neurons and important heads.

Labels steer training only. Recall, the oracle and `measure` count with the definitions that serving shares
(`selection`, `kernels.reference`): a neuron is active when its pre-activation is positive, a head when the
norm of its contribution after out_proj, ||W_h o_h||, exceeds its layer's threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_dejavu.kernels.reference import ACTIVATIONS
from vllm_dejavu.selection import head_contributions, head_grams

__all__ = ["Labels", "active_neurons", "head_contributions", "head_grams"]

NEURON_LABELS = ("positive", "energy")
HEAD_LABELS = ("contribution", "output_norm")


def active_neurons(pre_activations: torch.Tensor) -> torch.Tensor:
    """[num_tokens, ffn] pre-activations -> bool mask of the active ones."""
    return pre_activations > 0


def neuron_energy(
    pre_activations: torch.Tensor, fc2_norms: torch.Tensor, activation: str = "relu"
) -> torch.Tensor:
    """What each neuron adds to the output, |activation| x norm of its fc2 row: [num_tokens, ffn]."""
    return ACTIVATIONS[activation](pre_activations) * fc2_norms


@dataclass(frozen=True)
class Labels:
    """The targets of training.

    Attributes:
        neurons: "positive": every neuron that ReLU passes on; "energy": of each token, the fewest neurons
            that hold `energy_share` of the squared energies.
        heads: norm that importance is measured by: "contribution" after out_proj, or "output_norm" before it
            (the paper's).
        activation: of the model's MLP, which energies depend on.
    """

    neurons: str = "positive"
    energy_share: float = 0.99
    heads: str = "contribution"
    activation: str = "relu"

    def active(self, pre_activations: torch.Tensor, fc2_norms: torch.Tensor) -> torch.Tensor:
        """[num_tokens, ffn], bool: neurons a predictor should catch."""
        if self.neurons == "positive":
            return active_neurons(pre_activations)
        energy = neuron_energy(pre_activations, fc2_norms, self.activation) ** 2
        ordered, order = energy.sort(1, descending=True)
        held_before = ordered.cumsum(1) - ordered  # by the larger ones
        wanted = (held_before < self.energy_share * ordered.sum(1, keepdim=True)) & (ordered > 0)
        return torch.zeros_like(wanted).scatter_(1, order, wanted)

    def head_norms(self, attn: torch.Tensor, grams: torch.Tensor) -> torch.Tensor:
        """[num_tokens, heads], fp32. attn: [num_tokens, heads, head_size] before out_proj; grams:
        `head_grams`.
        """
        if self.heads == "output_norm":
            return attn.float().norm(dim=2)
        return head_contributions(attn, grams)

    def head_targets(self, attn: torch.Tensor, grams: torch.Tensor) -> torch.Tensor:
        """What head predictors regress on: the logarithm of the norms.

        The order of heads is the same as by the norm. Norms are skewed; a linear fit of their logarithm
        misplaces fewer small ones: on opt-books-7m, layer 0 at density 0.6 costs 0.0025 nats instead of
        0.0044.
        """
        return self.head_norms(attn, grams).clamp_min(1e-6).log()


def top_heads(norms: torch.Tensor, share: float) -> torch.Tensor:
    """The paper's rule: of each token, the `share` of heads with the largest norms. [num_tokens, heads] ->
    bool.
    """
    count = max(1, round(share * norms.shape[1]))
    return torch.zeros_like(norms, dtype=torch.bool).scatter_(1, norms.topk(count, dim=1).indices, True)
