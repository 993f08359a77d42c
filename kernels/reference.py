"""The PyTorch truth of every gated operation: fp32 inside, obvious at a glance, reads only what is selected.

Other implementations (Triton in `gpu`, C++ in `cpu`) have the same signatures and are compared with these.
Device-side counts are read by the host here, so this module cannot run inside a CUDA graph.

Two conventions run through all of it:

- `row_lens` [num_tokens], int32: rows with 0 only pad the batch; they select nothing and give 0. In a decode
  step it is vLLM's `seq_lens`.
- A neuron list is `neuron_ids` [ffn], int32, in segments of SEGMENT neurons, and `counts` [num_segments],
  int32: the first `counts[s]` entries of segment s are the selected neurons out of [s * SEGMENT, (s + 1) *
  SEGMENT), ascending; the rest hold `ffn`. So every segment can be written without knowing the others: no
  sort, no pass over all neurons.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

SEGMENT = 128
# What a gate's `counters` (int64) hold, in this order; callers may append counts of their own.
COUNTERS = ("steps", "rows", "selected", "read", "survived")


# {block: {hidden size: {tokens: union density}}} above which dense is faster than sparse, as measured for an
# implementation; here and where nothing was measured, never.
CROSSOVERS: dict[str, dict[int, dict[int, float]]] = {}
# Tokens of the largest batch that runs sparse until `tune` has measured a larger one; None: any.
LARGEST_BATCH: int | None = None


def describe() -> str:
    """What runs, for people."""
    return "PyTorch reference kernels"


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


def prepare_weight(weight: torch.Tensor) -> None:
    """Called with the memory of a weight that will be gathered from, allocated and not yet written."""


def low_rank_scores(
    x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Scores of neurons: `up(down(x)) + bias`.

    Args:
        x: [num_tokens, hidden], any float dtype. down: [rank, hidden]; up: [units, rank]; bias: [units],
            fp32.

    Returns:
        [num_tokens, units], fp32.
    """
    return F.linear(F.linear(x.float(), down.float()), up.float(), bias)


def linear_scores(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Scores of heads: `weight(x) + bias`; weight: [units, hidden]. Returns [num_tokens, units], fp32."""
    return F.linear(x.float(), weight.float(), bias)


def select(scores: torch.Tensor, row_lens: torch.Tensor) -> torch.Tensor:
    """The selection rule: a unit of a row is selected when its score is positive and the row holds a token.

    Args:
        scores: [num_tokens, units], fp32.

    Returns:
        [num_tokens, units], bool.
    """
    return (scores > 0) & (row_lens > 0)[:, None]


def score_heads(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, row_lens: torch.Tensor, workspace: Any = None
) -> torch.Tensor:
    """Head scores [num_tokens, heads], fp32; a head of a row is selected when its score is positive.

    Args:
        x: [num_tokens, hidden]. weight: [heads, hidden]; bias: [heads], fp32.
        workspace: scratch memory of implementations that need it.

    Returns:
        Scores; -1 in rows that only pad the batch.
    """
    return linear_scores(x, weight, bias).masked_fill(~(row_lens > 0)[:, None], -1.0)


def compact_union(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Neurons selected by any row, as a neuron list.

    Args:
        mask: [num_tokens, ffn], bool.

    Returns:
        neuron_ids: [ffn], int32; counts: [ceil(ffn / SEGMENT)], int32 (see the module's docstring).
    """
    ffn = mask.shape[1]
    ids = torch.full((ffn,), ffn, dtype=torch.int32, device=mask.device)
    counts = []
    for start, part in zip(range(0, ffn, SEGMENT), mask.any(dim=0).split(SEGMENT), strict=True):
        found = part.nonzero().flatten().to(torch.int32)
        ids[start : start + found.numel()] = found + start
        counts.append(found.numel())
    return ids, torch.tensor(counts, dtype=torch.int32, device=mask.device)


def listed(neuron_ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The selected neurons of a neuron list, ascending, without the gaps between segments: [sum(counts)],
    int64.
    """
    place = torch.arange(neuron_ids.shape[0], device=neuron_ids.device)
    return neuron_ids[place % SEGMENT < counts[place // SEGMENT]].long()


def select_neurons(
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor,
    row_lens: torch.Tensor,
    with_row_mask: bool = False,
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    counters: torch.Tensor | None = None,
    workspace: Any = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Predict, threshold and unite: the neurons that some row of the batch selects.

    Args:
        x: [num_tokens, hidden]. down: [rank, hidden]; up: [ffn, rank]; bias: [ffn], fp32, with the threshold
            in it.
        with_row_mask: whether each row's own selection is wanted too.
        heads: (x [num_tokens, hidden], weight, bias) of a head predictor to be scored on the way
            (`score_heads`), which saves a launch; or None.
        counters: COUNTERS of the MLP gate, or None; steps, rows, selected and read are added to it.

    Returns:
        neuron_ids [ffn] and counts: a neuron list; row_mask: [num_tokens, ffn], bool, or [0, ffn] if not
        wanted; head scores [num_tokens, heads], fp32, or None.
    """
    mask = select(low_rank_scores(x, down, up, bias), row_lens)
    count(counters, steps=1, rows=(row_lens > 0).sum(), selected=mask.sum(), read=mask.any(dim=0).sum())
    scores = None if heads is None else score_heads(*heads, row_lens)
    return *compact_union(mask), mask if with_row_mask else mask[:0].clone(), scores


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
    counts: torch.Tensor,
    row_lens: torch.Tensor,
    row_mask: torch.Tensor | None = None,
    activation: str = "relu",
    counters: torch.Tensor | None = None,
    workspace: Any = None,
) -> torch.Tensor:
    """MLP over the selected neurons only.

    Args:
        x: [num_tokens, hidden].
        fc1_weight: [ffn, hidden]; fc1_bias: [ffn] or None; fc2_weight_t: [ffn, hidden] (fc2 transposed).
        neuron_ids, counts: a neuron list, shared by all rows.
        row_mask: [num_tokens, ffn], bool, or None: restricts each row to its own neurons.
        activation: key of ACTIVATIONS; 0 at 0, so that neurons that came out <= 0 add nothing and fc2 skips
            them.
        counters: COUNTERS of the MLP gate, or None; the number of fc2 rows read is added to `survived`.

    Returns:
        [num_tokens, hidden], dtype of x, without fc2's bias (added after the all-reduce); accumulates in
        fp32.
    """
    ids = listed(neuron_ids, counts)
    h = mlp_activations(x, fc1_weight[ids], None if fc1_bias is None else fc1_bias[ids])
    keep = (row_lens > 0)[:, None] if row_mask is None else (row_lens > 0)[:, None] & row_mask[:, ids]
    h = torch.where(keep, ACTIVATIONS[activation](h), 0.0)
    alive = (h > 0).any(dim=0)
    count(counters, survived=alive.sum())
    return (h[:, alive] @ fc2_weight_t[ids[alive]].float()).to(x.dtype)


def dense_mlp(
    x: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight_t: torch.Tensor,
    activation: str = "relu",
) -> torch.Tensor:
    """MLP over all neurons, in the dtype of x throughout: what a gated block runs when a step or its union is
    not sparse.

    Shapes and result as `sparse_mlp`.
    """
    return ACTIVATIONS[activation](linear(x, fc1_weight, fc1_bias)) @ fc2_weight_t


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """[num_tokens, in] -> [num_tokens, out], in the dtype of x; weight: [out, in]. `output`, if given, is
    filled and returned.
    """
    result = F.linear(x, weight, bias)
    return result if output is None else output.copy_(result)


def sparse_qkv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    head_scores: torch.Tensor,
    row_lens: torch.Tensor,
    head_size: int,
    counters: torch.Tensor | None = None,
    workspace: Any = None,
) -> torch.Tensor:
    """Q rows of the heads that any row selected; K and V of all heads (the cache stays complete).

    Args:
        x: [num_tokens, hidden].
        weight: [(heads + 2 * kv_heads) * head_size, hidden], rows in the order Q, K, V; bias: the same
            length, or None.
        head_scores: [num_tokens, heads], fp32, not positive in rows that only pad the batch (`score_heads`).
        counters: COUNTERS of the attention gate, or None; steps, rows, selected and read are added to it.

    Returns:
        [num_tokens, rows of weight], dtype of x; Q of heads that no row selected is 0.
    """
    chosen = head_scores > 0
    read = chosen.any(dim=0)
    count(counters, steps=1, rows=(row_lens > 0).sum(), selected=chosen.sum(), read=read.sum())
    rows = torch.ones(weight.shape[0], dtype=torch.bool, device=x.device)
    rows[: chosen.shape[1] * head_size] = read.repeat_interleave(head_size)
    out = x.new_zeros(x.shape[0], weight.shape[0])
    out[:, rows] = F.linear(x.float(), weight[rows].float(), None if bias is None else bias[rows].float()).to(
        x.dtype
    )
    return out


def mask_heads(attn: torch.Tensor, head_scores: torch.Tensor) -> torch.Tensor:
    """[num_tokens, heads, head_size] with the unselected heads of each row set to 0; head_scores:
    [num_tokens, heads].
    """
    return torch.where(
        (head_scores > 0)[:, :, None], attn, torch.zeros((), dtype=attn.dtype, device=attn.device)
    )


def sparse_out_proj(
    attn: torch.Tensor,
    weight: torch.Tensor,
    head_scores: torch.Tensor,
    output: torch.Tensor | None = None,
    workspace: Any = None,
) -> torch.Tensor:
    """Output projection over the columns of the heads that any row selected.

    Args:
        attn: [num_tokens, heads, head_size]; heads a row did not select hold 0.
        weight: [hidden, heads * head_size]. head_scores: [num_tokens, heads].
        output: [num_tokens, hidden] to be written, or None for a new one.

    Returns:
        [num_tokens, hidden], dtype of attn, without bias; accumulates in fp32.
    """
    columns = (head_scores > 0).any(dim=0).repeat_interleave(attn.shape[2])
    result = F.linear(attn.flatten(1)[:, columns].float(), weight[:, columns].float()).to(attn.dtype)
    return result if output is None else output.copy_(result)


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    head_scores: torch.Tensor,
    max_model_len: int | None = None,
    workspace: Any = None,
) -> torch.Tensor:
    """Decode attention of the selected heads, read from the paged cache.

    Args:
        query: [num_tokens, heads, head_size], one token a sequence.
        kv_cache: [num_blocks, kv_heads, block_size, 2 * head_size] by any strides; K first, then V (the
            layout of vLLM's FLASH_ATTN and TRITON_ATTN backends).
        block_table: [num_tokens, max_blocks], int32. seq_lens: [num_tokens], int32, with the current token.
        head_scores: [num_tokens, heads].
        max_model_len: no sequence is longer; implementations divide their work by it. None: whatever
            block_table holds.

    Returns:
        [num_tokens, heads, head_size], dtype of query; 0 for unselected heads and for rows of length 0.
    """
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    heads, head_size = query.shape[1:]
    block_size = kv_cache.shape[2]
    group = heads // kv_cache.shape[1]
    for row, length in enumerate(seq_lens.tolist()):
        for head in (head_scores[row] > 0).nonzero().flatten().tolist() if length else ():
            blocks = block_table[row, : -(-length // block_size)].long()
            kv = kv_cache[blocks, head // group].flatten(0, 1)[:length].float()  # [length, 2 * head_size]
            weights = torch.softmax(scale * (kv[:, :head_size] @ query[row, head].float()), dim=0)
            out[row, head] = (weights @ kv[:, head_size:]).to(query.dtype)
    return out
