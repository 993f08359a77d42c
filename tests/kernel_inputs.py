"""Inputs of kernel tests: random tensors, and NaN wherever a kernel must not read.

Apart from the tests, so that a host with pytest and torch alone can import them.
"""

import torch

NAN = float("nan")
DENSITIES = [0.0, 0.2, 1.0]
DENSITY_IDS = ["none-selected", "some-selected", "all-selected"]


def rand(*shape, seed=0, dtype=torch.float32, fan_in=1):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * fan_in**-0.5).to(dtype)


def rand_mask(*shape, density, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < density


def poison(tensor, keep, dim=0):
    """A copy with NaN at the indices of `dim` that are not kept, and behind its end."""
    guarded = torch.cat([tensor, torch.full_like(tensor[:1], NAN)])
    return guarded[:-1].index_fill_(dim, (~keep).nonzero().flatten(), NAN)


def row_lens_of(valid):
    """Lengths of rows, 0 where they only pad the batch."""
    return torch.where(valid, torch.arange(1, len(valid) + 1, device=valid.device), 0).to(torch.int32)


def scores_of(mask):
    """Head scores that select `mask`: small positive ones, and among the others 0 and -0."""
    size = torch.rand(mask.shape, generator=torch.Generator().manual_seed(6)).to(mask.device)
    return torch.where(mask, size + 1e-6, torch.where(size < 0.3, -0.0, torch.where(size < 0.6, 0.0, -size)))


def paged_cache(keys, values, needed, block_size, layout):
    """Scatter sequences over shuffled blocks; all that is not needed stays NaN.

    Args:
        keys, values: per sequence [length, kv_heads, head_size]. needed: [sequences, kv_heads], bool.
        layout: physical order inside a block, "HND" or "NHD".

    Returns:
        kv_cache [num_blocks, kv_heads, block_size, 2 * head_size] by the layout's strides, block_table whose
        unused entries name the block behind the cache's last, which holds NaN.
    """
    kv_heads, head_size = keys[0].shape[1:]
    counts = [-(-len(k) // block_size) for k in keys]
    num_blocks = sum(counts) + 2
    shuffled = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(5)).tolist()
    outer, inner = (kv_heads, block_size) if layout == "HND" else (block_size, kv_heads)
    cache = torch.full((num_blocks + 1, outer, inner, 2 * head_size), NAN, dtype=keys[0].dtype)
    cache = cache if layout == "HND" else cache.transpose(1, 2)
    table = torch.full((len(keys), max(counts) + 1), num_blocks, dtype=torch.int32)
    for row, (k, v) in enumerate(zip(keys, values, strict=True)):
        kv = torch.where(needed[row, :, None], torch.cat([k, v], 2), NAN).transpose(0, 1)
        for i in range(counts[row]):
            table[row, i] = shuffled.pop()
            part = kv[:, i * block_size : (i + 1) * block_size]
            cache[int(table[row, i]), :, : part.shape[1]] = part
    return cache[:-1], table
