"""The kernels as functions of flat lists of tensors, so that tests can vary, poison and break each by its
name.
"""

from __future__ import annotations

import torch

from vllm_dejavu.kernels import reference
from vllm_dejavu.kernels.interface import (
    COUNTERS,
    SEGMENT,
    Cache,
    Call,
    Kernels,
    Linear,
    LowRank,
    Mlp,
    Rider,
    Rows,
    Selection,
)


class Flat:
    """The functions of one implementation.

    A mask that is not wanted comes back as [0, ffn].
    """

    SEGMENT, COUNTERS = SEGMENT, COUNTERS

    def __init__(self, kernels: Kernels):
        self.kernels = kernels
        self.mask_heads, self.count_dense = kernels.mask_heads, kernels.count_dense
        self.prepare_weight = kernels.prepare_weight

    def score_heads(self, x, weight, bias, row_lens, workspace=None):
        return self.kernels.score_heads(x, Linear(weight, bias), Call(row_lens, None, workspace))

    def select_neurons(
        self, x, down, up, bias, row_lens, with_row_mask=False, heads=None, counters=None, workspace=None
    ):
        rider = None if heads is None else Rider(heads[0], Linear(*heads[1:]))
        call = Call(row_lens, counters, workspace)
        predictor = LowRank(down, up, bias)
        selection, scores = self.kernels.select_neurons(x, predictor, call, with_row_mask, rider)
        assert (selection.mask is not None) == with_row_mask
        mask = x.new_empty(0, len(up), dtype=torch.bool) if selection.mask is None else selection.mask
        return selection.ids, selection.counts, mask, scores

    def sparse_mlp(
        self,
        x,
        fc1_weight,
        fc1_bias,
        fc2_weight_t,
        neuron_ids,
        counts,
        row_lens,
        row_mask=None,
        activation="relu",
        counters=None,
        workspace=None,
    ):
        mlp = Mlp(Rows(fc1_weight, fc1_bias), Rows(fc2_weight_t, transposed=True), activation)
        selection = Selection(neuron_ids, counts, row_mask)
        return self.kernels.sparse_mlp(x, mlp, selection, Call(row_lens, counters, workspace))

    def dense_mlp(self, x, fc1_weight, fc1_bias, fc2_weight_t, activation="relu"):
        mlp = Mlp(Rows(fc1_weight, fc1_bias), Rows(fc2_weight_t, transposed=True), activation)
        return self.kernels.sparse_mlp(x, mlp)

    def linear(self, x, weight, bias=None, output=None):
        return self.kernels.linear(x, Rows(weight, bias), output)

    def sparse_qkv(self, x, weight, bias, head_scores, row_lens, head_size, counters=None, workspace=None):
        call = Call(row_lens, counters, workspace)
        return self.kernels.sparse_qkv(x, Rows(weight, bias), head_scores, head_size, call)

    def sparse_out_proj(self, attn, weight, head_scores, output=None, workspace=None):
        return self.kernels.sparse_out_proj(attn, Rows(weight), head_scores, output)

    def paged_attention(
        self,
        query,
        kv_cache,
        block_table,
        seq_lens,
        scale,
        head_scores,
        max_model_len=None,
        workspace=None,
    ):
        cache = Cache(kv_cache, block_table, seq_lens, max_model_len)
        call = Call(seq_lens, None, workspace)
        return self.kernels.paged_attention(query, cache, scale, head_scores, call)


class FlatReference(Flat):
    """With what only the reference has."""

    select, ACTIVATIONS = staticmethod(reference.select), reference.ACTIVATIONS

    def __init__(self):
        super().__init__(reference.KERNELS)

    def low_rank_scores(self, x, down, up, bias):
        return reference.scores(x, LowRank(down, up, bias))

    def linear_scores(self, x, weight, bias):
        return reference.scores(x, Linear(weight, bias))

    def compact_union(self, mask):
        return reference.compact_union(mask)[:2]

    def listed(self, neuron_ids, counts):
        return reference.listed(Selection(neuron_ids, counts))

    def mlp_activations(self, x, weight, bias):
        return reference.mlp_activations(x, Rows(weight, bias))


flat_reference = FlatReference()
