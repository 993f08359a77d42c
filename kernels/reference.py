"""The PyTorch truth of every gated operation: fp32 inside, obvious at a glance, reads only what is selected.

Other implementations (Triton in `gpu`, C++ in `cpu`) are compared with these. Device-side counts are read by
the host here, so this module cannot run inside a CUDA graph. Shapes and conventions: `interface`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

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


def count(counters: torch.Tensor | None, **amounts: Any) -> None:
    """Add to counters by name, on the device."""
    if counters is not None:
        for name, amount in amounts.items():
            counters[COUNTERS.index(name)] += amount


def count_dense(
    counters: torch.Tensor, once: torch.Tensor, per_row: torch.Tensor, row_lens: torch.Tensor
) -> None:
    """Count a dense pass of a gated block: `once`, and `per_row` for each row that holds a token.

    Args:
        counters, once, per_row: [counters], int64. row_lens: [num_tokens], int32.
    """
    counters += torch.addcmul(once, (row_lens > 0).sum(), per_row)


def scores(x: torch.Tensor, predictor: LowRank | Linear) -> torch.Tensor:
    """What a predictor says of every unit: x [T, hidden], of any float type -> [T, units], fp32."""
    x = x.float()
    if isinstance(predictor, LowRank):
        x = F.linear(x, predictor.down.float())
        return F.linear(x, predictor.up.float(), predictor.bias)
    return F.linear(x, predictor.weight.float(), predictor.bias)


def select(scores: torch.Tensor, row_lens: torch.Tensor) -> torch.Tensor:
    """The selection rule: a unit of a row is selected when its score is positive and the row holds a token.

    Args:
        scores: [num_tokens, units], fp32.

    Returns:
        [num_tokens, units], bool.
    """
    return (scores > 0) & (row_lens > 0)[:, None]


def score_heads(x: torch.Tensor, predictor: Linear, call: Call) -> torch.Tensor:
    """Head scores [T, heads], fp32; a head of a row is selected when its score is positive.

    Args:
        x: [T, hidden]. call: its counters are not touched (`sparse_qkv` counts).

    Returns:
        Scores; -1 in rows that only pad the batch.
    """
    return scores(x, predictor).masked_fill(~(call.row_lens > 0)[:, None], -1.0)


def compact_union(mask: torch.Tensor) -> Selection:
    """Neurons selected by any row of a mask [T, ffn], bool; without the mask."""
    ffn = mask.shape[1]
    ids = torch.full((ffn,), ffn, dtype=torch.int32, device=mask.device)
    counts = []
    for start, part in zip(range(0, ffn, SEGMENT), mask.any(dim=0).split(SEGMENT), strict=True):
        found = part.nonzero().flatten().to(torch.int32)
        ids[start : start + found.numel()] = found + start
        counts.append(found.numel())
    return Selection(ids, torch.tensor(counts, dtype=torch.int32, device=mask.device))


def listed(selection: Selection) -> torch.Tensor:
    """The selected neurons, ascending, without the gaps between segments: [sum(counts)], int64."""
    place = torch.arange(selection.ids.shape[0], device=selection.ids.device)
    return selection.ids[place % SEGMENT < selection.counts[place // SEGMENT]].long()


def select_neurons(
    x: torch.Tensor, predictor: LowRank, call: Call, with_mask: bool = False, rider: Rider | None = None
) -> tuple[Selection, torch.Tensor | None]:
    """Predict, threshold and unite: the neurons that some row of the batch selects.

    Args:
        x: [T, hidden].
        call: steps, rows, selected and read are added to its counters, of the MLP gate.
        with_mask: whether each row's own selection is wanted too.

    Returns:
        The selection, with a mask where that is wanted; the rider's head scores [T, heads], or None.
    """
    mask = select(scores(x, predictor), call.row_lens)
    valid = call.row_lens > 0
    count(call.counters, steps=1, rows=valid.sum(), selected=mask.sum(), read=mask.any(dim=0).sum())
    head_scores = None if rider is None else score_heads(*rider, call)
    return compact_union(mask)._replace(mask=mask if with_mask else None), head_scores


def mlp_activations(x: torch.Tensor, up: Rows) -> torch.Tensor:
    """Pre-activations `up(x)`: [T, hidden] -> [T, ffn], fp32, as any linear's outputs."""
    return F.linear(x.float(), up.floats(), None if up.bias is None else up.bias.float())


def taken(rows: Rows, ids: torch.Tensor) -> Rows:
    """Some rows of a weight, with what is theirs of scales and biases."""
    scale = rows.scale
    if rows.bits == 4:
        ids = ids.nonzero().flatten() if ids.dtype == torch.bool else ids
        scale = scale[ids // (len(rows.weight) // len(scale))]
    elif scale is not None and not rows.transposed:
        scale = scale[ids]
    bias = rows.bias if rows.bias is None or rows.transposed else rows.bias[ids]
    return rows._replace(weight=rows.weight[ids], bias=bias, scale=scale)


ACTIVATIONS = {"relu": F.relu, "relu2": lambda x: F.relu(x).square()}


def sparse_mlp(
    x: torch.Tensor, mlp: Mlp, selection: Selection | None = None, call: Call | None = None
) -> torch.Tensor:
    """MLP over the selected neurons only.

    Args:
        x: [T, hidden].
        selection: shared by all rows; a mask restricts each row to its own neurons. None: every neuron, in
            the dtype of x throughout, as a dense layer computes: what a gated block runs when a step, or its
            union, is not sparse. Padding rows are computed like any other then, and nothing is counted.
        call: of a selection; the number of rows of `down` read is added to `survived` of its counters, of the
            MLP gate.

    Returns:
        [T, hidden], dtype of x, without down's bias; accumulates in fp32.
    """
    activation = ACTIVATIONS[mlp.activation]
    if selection is None:
        return linear(activation(linear(x, mlp.up)), mlp.down)
    ids = listed(selection)
    keep = (call.row_lens > 0)[:, None]
    if selection.mask is not None:
        keep = keep & selection.mask[:, ids]
    h = torch.where(keep, activation(mlp_activations(x, taken(mlp.up, ids))), 0.0)
    alive = (h > 0).any(dim=0)
    count(call.counters, survived=alive.sum())
    return F.linear(h[:, alive], taken(mlp.down, ids[alive]).floats()).to(x.dtype)


def exact_down(h: torch.Tensor, down: Rows, activation: str, crossover: float, call: Call) -> torch.Tensor:
    """The second half of an MLP of which no neuron was chosen: the activation, and the rows of `down` whose
    neuron came out positive for some row.

    Args:
        h: [T, ffn], what the first half gave, with its bias.
        crossover: implementations may go by tiles of a few rows, each with its own neurons, where these are
            on average no more than this share of what all rows together need.
        call: to its counters are added: steps (tiles), rows, selected (positive neurons of rows), read and
            survived (neurons that some row of a tile needs), and, past COUNTERS, what the implementation
            says.

    Returns:
        [T, hidden], dtype of h, without down's bias; accumulates in fp32.
    """
    valid = (call.row_lens > 0)[:, None]
    h = torch.where(valid, ACTIVATIONS[activation](h), 0)
    alive = (h != 0).any(dim=0)
    read = alive.sum()
    count(call.counters, steps=1, rows=valid.sum(), selected=(h != 0).sum(), read=read, survived=read)
    return F.linear(h[:, alive].float(), taken(down, alive).floats()).to(h.dtype)


def linear(x: torch.Tensor, rows: Rows, output: torch.Tensor | None = None) -> torch.Tensor:
    """[T, in] -> [T, out], in the dtype of x; `output`, if given, is filled and returned."""
    result = F.linear(x, rows.floats(x.dtype), rows.bias)
    return result if output is None else output.copy_(result)


def sparse_qkv(
    x: torch.Tensor, qkv: Rows, head_scores: torch.Tensor, head_size: int, call: Call
) -> torch.Tensor:
    """Q rows of the heads that any row selected; K and V of all heads (the cache stays complete).

    Args:
        x: [T, hidden].
        qkv: as `Attention.qkv`.
        head_scores: [T, heads], fp32, not positive in rows that only pad the batch (`score_heads`).
        call: steps, rows, selected and read are added to its counters, of the attention gate.

    Returns:
        [T, rows of qkv], dtype of x; Q of heads that no row selected is 0.
    """
    chosen = head_scores > 0
    read = chosen.any(dim=0)
    valid = call.row_lens > 0
    count(call.counters, steps=1, rows=valid.sum(), selected=chosen.sum(), read=read.sum())
    rows = torch.ones(qkv.weight.shape[0], dtype=torch.bool, device=x.device)
    rows[: chosen.shape[1] * head_size] = read.repeat_interleave(head_size)
    out = x.new_zeros(x.shape[0], qkv.weight.shape[0])
    out[:, rows] = mlp_activations(x, taken(qkv, rows)).to(x.dtype)
    return out


def mask_heads(attn: torch.Tensor, head_scores: torch.Tensor) -> torch.Tensor:
    """[num_tokens, heads, head_size] with the unselected heads of each row set to 0; head_scores:
    [num_tokens, heads].
    """
    return torch.where(
        (head_scores > 0)[:, :, None], attn, torch.zeros((), dtype=attn.dtype, device=attn.device)
    )


def sparse_out_proj(
    attn: torch.Tensor, out: Rows, head_scores: torch.Tensor, output: torch.Tensor | None = None
) -> torch.Tensor:
    """Output projection over the columns of the heads that any row selected.

    Args:
        attn: [T, heads, head_size]; heads that a row did not select hold 0.
        out: as `Attention.out`; its bias is not added. head_scores: [T, heads].
        output: [T, hidden] to be written, or None for a new one.

    Returns:
        [T, hidden], dtype of attn, without bias; accumulates in fp32.
    """
    inputs = (head_scores > 0).any(dim=0).repeat_interleave(attn.shape[2])
    weight = out.floats()[:, inputs]
    result = F.linear(attn.flatten(1)[:, inputs].float(), weight).to(attn.dtype)
    return result if output is None else output.copy_(result)


def paged_attention(
    query: torch.Tensor, cache: Cache, scale: float, head_scores: torch.Tensor, call: Call
) -> torch.Tensor:
    """Decode attention of the selected heads, read from the paged cache.

    Args:
        query: [T, heads, head_size], one token a sequence. head_scores: [T, heads].

    Returns:
        [T, heads, head_size], dtype of query; 0 for unselected heads and for rows of length 0.
    """
    output = torch.zeros_like(query, memory_format=torch.contiguous_format)
    heads, head_size = query.shape[1:]
    block_size = cache.kv.shape[2]
    group = heads // cache.kv.shape[1]
    for row, length in enumerate(cache.seq_lens.tolist()):
        for head in (head_scores[row] > 0).nonzero().flatten().tolist() if length else ():
            blocks = cache.block_table[row, : -(-length // block_size)].long()
            kv = cache.kv[blocks, head // group].flatten(0, 1)[:length].float()  # [length, 2 * head_size]
            weights = torch.softmax(scale * (kv[:, :head_size] @ query[row, head].float()), dim=0)
            output[row, head] = (weights @ kv[:, head_size:]).to(query.dtype)
    return output


class ReferenceKernels(Kernels):
    name = "PyTorch reference kernels"
    activations = ("relu", "relu2")
    weight_bits = (16, 8, 4)
    score_heads = staticmethod(score_heads)
    select_neurons = staticmethod(select_neurons)
    sparse_mlp = staticmethod(sparse_mlp)
    exact_down = staticmethod(exact_down)
    linear = staticmethod(linear)
    sparse_qkv = staticmethod(sparse_qkv)
    mask_heads = staticmethod(mask_heads)
    sparse_out_proj = staticmethod(sparse_out_proj)
    paged_attention = staticmethod(paged_attention)
    count_dense = staticmethod(count_dense)


KERNELS = ReferenceKernels()
