"""The PyTorch truth of every gated operation: fp32 inside, obvious at a glance, reads only what is selected.

Other implementations (Triton, native CPU) have the same signatures and are compared with these. Device-side counts
are read by the host here, so this module cannot run inside a CUDA graph.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F


def low_rank_scores(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Scores of neurons: `up(down(x)) + bias`.

    Args:
        x: [num_tokens, hidden], any float dtype. down: [rank, hidden]; up: [units, rank]; bias: [units], fp32.

    Returns:
        [num_tokens, units], fp32.
    """
    return F.linear(F.linear(x.float(), down.float()), up.float(), bias)


def linear_scores(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Scores of heads: `weight(x) + bias`; weight: [units, hidden]. Returns [num_tokens, units], fp32."""
    return F.linear(x.float(), weight.float(), bias)


def select(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The selection rule: a unit of a row is selected when its score is positive and the row is valid.

    Args:
        scores: [num_tokens, units], fp32. valid: [num_tokens], bool; padding rows are False and select nothing.

    Returns:
        [num_tokens, units], bool.
    """
    return (scores > 0) & valid[:, None]


def compact_union(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Units selected by any row, as a list.

    Args:
        mask: [num_tokens, units], bool.

    Returns:
        ids: [units], int32, ascending; only the first `num_selected` are valid (the rest hold `units`).
        num_selected: [1], int32.
    """
    units = mask.shape[1]
    found = mask.any(dim=0).nonzero().flatten().to(torch.int32)
    ids = torch.full((units,), units, dtype=torch.int32, device=mask.device)
    ids[: found.numel()] = found
    return ids, torch.tensor([found.numel()], dtype=torch.int32, device=mask.device)


def mlp_activations(x: torch.Tensor, fc1_weight: torch.Tensor, fc1_bias: torch.Tensor | None) -> torch.Tensor:
    """Pre-activations `fc1(x)`: [num_tokens, hidden] -> [num_tokens, rows of fc1_weight], fp32."""
    return F.linear(x.float(), fc1_weight.float(), None if fc1_bias is None else fc1_bias.float())


ACTIVATIONS = {"relu": F.relu}


def sparse_mlp(
    x: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight_t: torch.Tensor,
    neuron_ids: torch.Tensor,
    num_selected: torch.Tensor,
    row_mask: torch.Tensor | None = None,
    activation: str = "relu",
    survived: torch.Tensor | None = None,
) -> torch.Tensor:
    """MLP over the selected neurons only.

    Args:
        x: [num_tokens, hidden].
        fc1_weight: [ffn, hidden]; fc1_bias: [ffn] or None; fc2_weight_t: [ffn, hidden] (fc2 transposed).
        neuron_ids: [ffn], int32, ascending; the first num_selected are valid and shared by all rows.
        num_selected: [1], int32.
        row_mask: [num_tokens, ffn], bool, or None: restricts each row to its own neurons.
        activation: key of ACTIVATIONS; 0 at 0, so that neurons that came out <= 0 add nothing and fc2 skips them.
        survived: [1], int64, or None: the number of fc2 rows read is added to it.

    Returns:
        [num_tokens, hidden], dtype of x, without fc2's bias (added after the all-reduce); accumulates in fp32.
    """
    ids = neuron_ids[: int(num_selected)].long()
    h = mlp_activations(x, fc1_weight[ids], None if fc1_bias is None else fc1_bias[ids])
    h = ACTIVATIONS[activation](h)
    if row_mask is not None:
        h = torch.where(row_mask[:, ids], h, 0.0)
    alive = (h != 0).any(dim=0)
    if survived is not None:
        survived += alive.sum()
    return (h[:, alive] @ fc2_weight_t[ids[alive]].float()).to(x.dtype)


def sparse_qkv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, head_mask: torch.Tensor
) -> torch.Tensor:
    """Q rows of the heads that any row selected; K and V of all heads (the cache stays complete).

    Args:
        x: [num_tokens, hidden].
        weight: [3 * heads * head_size, hidden], rows in the order Q, K, V; bias: [3 * heads * head_size] or None.
        head_mask: [num_tokens, heads], bool.

    Returns:
        [num_tokens, 3 * heads * head_size], dtype of x; Q of heads that no row selected is 0.
    """
    heads = head_mask.shape[1]
    head_size = weight.shape[0] // (3 * heads)
    rows = torch.ones(weight.shape[0], dtype=torch.bool, device=x.device)
    rows[: heads * head_size] = head_mask.any(dim=0).repeat_interleave(head_size)
    out = x.new_zeros(x.shape[0], weight.shape[0])
    out[:, rows] = F.linear(x.float(), weight[rows].float(), None if bias is None else bias[rows].float()).to(x.dtype)
    return out


def mask_heads(attn: torch.Tensor, head_mask: torch.Tensor) -> torch.Tensor:
    """[num_tokens, heads, head_size] with the unselected heads of each row set to 0; head_mask: [num_tokens, heads]."""
    return torch.where(head_mask[:, :, None], attn, torch.zeros((), dtype=attn.dtype, device=attn.device))


def sparse_out_proj(attn: torch.Tensor, weight: torch.Tensor, head_mask: torch.Tensor) -> torch.Tensor:
    """Output projection over the columns of the heads that any row selected.

    Args:
        attn: [num_tokens, heads, head_size]; heads a row did not select hold 0.
        weight: [hidden, heads * head_size]. head_mask: [num_tokens, heads], bool.

    Returns:
        [num_tokens, hidden], dtype of attn, without bias; accumulates in fp32.
    """
    columns = head_mask.any(dim=0).repeat_interleave(attn.shape[2])
    return F.linear(attn.flatten(1)[:, columns].float(), weight[:, columns].float()).to(attn.dtype)


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    head_mask: torch.Tensor,
) -> torch.Tensor:
    """Decode attention of the selected heads, read from the paged cache.

    Args:
        query: [num_tokens, heads, head_size], one token a sequence.
        kv_cache: [num_blocks, kv_heads, block_size, 2 * head_size] by any strides; K first, then V (the layout of
            vLLM's FLASH_ATTN and TRITON_ATTN backends).
        block_table: [num_tokens, max_blocks], int32. seq_lens: [num_tokens], int32, with the current token.
        head_mask: [num_tokens, heads], bool.

    Returns:
        [num_tokens, heads, head_size], dtype of query; 0 for unselected heads and for rows of length 0.
    """
    out = torch.zeros_like(query)
    heads, head_size = query.shape[1:]
    block_size = kv_cache.shape[2]
    group = heads // kv_cache.shape[1]
    for row, length in enumerate(seq_lens.tolist()):
        for head in head_mask[row].nonzero().flatten().tolist() if length else ():
            blocks = block_table[row, : -(-length // block_size)].long()
            kv = kv_cache[blocks, head // group].flatten(0, 1)[:length].float()  # [length, 2 * head_size]
            weights = torch.softmax(scale * (kv[:, :head_size] @ query[row, head].float()), dim=0)
            out[row, head] = (weights @ kv[:, head_size:]).to(query.dtype)
    return out
