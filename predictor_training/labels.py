"""What counts as an active neuron and an important head.

The definitions live in `kernels.reference` and `selection`, where the serving oracle uses them too:

- a neuron is active when its pre-activation is positive (ReLU passes it on);
- a head is active when the norm of its contribution after out_proj, ||W_h o_h||, exceeds its layer's threshold.
"""
from __future__ import annotations

import torch

from vllm_dejavu.selection import head_contributions, head_grams

__all__ = ["active_neurons", "head_contributions", "head_grams", "log_contributions"]


def active_neurons(pre_activations: torch.Tensor) -> torch.Tensor:
    """[num_tokens, ffn] pre-activations -> bool mask of the active ones."""
    return pre_activations > 0


def log_contributions(attn: torch.Tensor, grams: torch.Tensor) -> torch.Tensor:
    """What head predictors regress on: log ||W_h o_h||, [num_tokens, heads].

    The order of heads is the same as by the norm. Norms are skewed; a linear fit of their logarithm misplaces fewer
    small ones: on opt-books-7m, layer 0 at density 0.6 costs 0.0025 nats instead of 0.0044.
    """
    return head_contributions(attn, grams).clamp_min(1e-6).log()
