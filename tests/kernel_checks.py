"""What every implementation of the kernels must pass, against the references: Triton's and the native one.

Everything a kernel must not read holds NaN: unselected weights, inputs of rows that only pad the batch, fc2
rows of neurons that came out negative. Selections and counts are compared exactly; biases keep scores off 0.
"""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kernel_flat import Flat
from kernel_flat import flat_reference as reference
from kernel_inputs import DENSITIES, DENSITY_IDS, NAN, poison, row_lens_of, scores_of
from kernel_inputs import rand as cpu_rand
from kernel_inputs import rand_mask as cpu_rand_mask
from tolerances import DTYPE_IDS, DTYPES, assert_close

from vllm_dejavu.predictor import quantize

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
every_density = pytest.mark.parametrize("density", DENSITIES, ids=DENSITY_IDS)
PADDINGS = ["none", "some", "all"]
every_padding = pytest.mark.parametrize("padding", PADDINGS, ids=lambda name: f"padding-{name}")


def of_dtype(tensors, dtype):
    """A predictor's tensors as an artifact of this dtype would hold them."""
    if dtype == torch.int8:
        return tuple(quantize(tensors, 8).values())
    return tuple(t if name == "bias" else t.to(dtype) for name, t in tensors.items())


@dataclass(frozen=True)
class Checks:
    """The checks, for one implementation on one device; a name of the reference's checks the function of that
    name.

    Attributes:
        kernels: a `Flat`, or what has the functions of one.
    """

    kernels: Flat | Any
    device: torch.device

    def rand(self, *shape, **options):
        return cpu_rand(*shape, **options).to(self.device)

    def rand_mask(self, *shape, **options):
        return cpu_rand_mask(*shape, **options).to(self.device)

    def rows(self, tokens, padding):
        """Which rows hold a token."""
        number = torch.arange(tokens, device=self.device)
        return {"none": number >= 0, "some": number % 3 != 1, "all": number < 0}[padding]

    def new_counters(self, wanted=True):
        # one more than COUNTERS: callers may append
        return torch.arange(100, 106, device=self.device) if wanted else None

    def clear_bias(self, scores, density):
        """A bias [units] that selects about a share `density` and leaves no score within 1e-4 of 0; 1: as the
        dense switch does.
        """
        if density in (0, 1):
            return torch.full((scores.shape[1],), math.inf if density else -50.0, device=self.device)
        candidates = torch.linspace(-0.9, 0.1, 41, device=self.device) + math.log(density)
        distance = (scores[:, :, None] + candidates).abs().amin(0)  # [units, candidates]
        assert distance.amax(1).min() > 1e-4
        return candidates[distance.argmax(1)]

    def select_neurons(
        self,
        tokens,
        hidden=72,
        rank=17,
        ffn=300,
        dtype=torch.float32,
        predictor=None,
        density=0.3,
        padding="some",
        with_row_mask=True,
        heads=5,
        counted=True,
        workspace=None,
        seed=0,
    ):
        """select_neurons against the reference; `predictor`: dtype of its weights, that of x unless given."""
        valid = self.rows(tokens, padding)
        x = self.rand(tokens, hidden, dtype=dtype, seed=seed)
        mlp = {
            "down": self.rand(rank, hidden, seed=1, fan_in=hidden),
            "up": self.rand(ffn, rank, seed=2, fan_in=rank),
        }
        down, up, _ = of_dtype({**mlp, "bias": torch.zeros(ffn, device=self.device)}, predictor or dtype)
        scores = reference.low_rank_scores(x, down, up, torch.zeros(ffn, device=self.device))
        # integers' scores have any scale
        scale = 1.0 if predictor != torch.int8 else float(scores.std()) or 1.0
        bias = scale * self.clear_bias(scores / scale, density)
        riding = None
        if heads:
            head_predictor = {
                "weight": self.rand(heads, hidden, seed=4, fan_in=hidden),
                "bias": self.rand(heads, seed=5),
            }
            riding = (
                poison(self.rand(tokens, hidden, seed=3, dtype=dtype), valid),
                *of_dtype(head_predictor, predictor or dtype),
            )
        found, expected = self.new_counters(counted), self.new_counters(counted)
        args = poison(x, valid), down, up, bias, row_lens_of(valid), with_row_mask, riding
        ids, counts, mask, scores = self.kernels.select_neurons(*args, found, workspace)
        want_ids, want_counts, want_mask, want_scores = reference.select_neurons(*args, expected)
        assert (ids.dtype, counts.dtype, mask.dtype) == (torch.int32, torch.int32, torch.bool)
        assert (
            torch.equal(counts, want_counts) and torch.equal(ids, want_ids) and torch.equal(mask, want_mask)
        )
        if density in (0, 1):
            assert counts.sum() == (ffn if density and valid.any() else 0)
        if counted:
            assert torch.equal(found, expected)
        if heads:
            assert scores.dtype == torch.float32 and scores[~valid].eq(-1).all()
            assert_close(scores, want_scores)
        else:
            assert scores is None

    def score_heads(self, tokens, dtype=torch.float32, padding="some", hidden=72, heads=19):
        """Alone, without a riding neuron predictor, for predictors of x's type, fp16 and int8; -1 in padded
        rows.
        """
        valid = self.rows(tokens, padding)
        x, bias = poison(self.rand(tokens, hidden, dtype=dtype), valid), self.rand(heads, seed=2)
        for kind in {dtype, torch.float16, torch.int8}:
            args = (
                x,
                *of_dtype({"weight": self.rand(heads, hidden, seed=1, fan_in=hidden), "bias": bias}, kind),
                row_lens_of(valid),
            )
            scores = self.kernels.score_heads(*args)
            assert scores.dtype == torch.float32 and scores[~valid].eq(-1).all()
            assert_close(scores, reference.score_heads(*args))

    def sparse_mlp(
        self,
        tokens,
        hidden=72,
        ffn=300,
        dtype=torch.float32,
        density=0.3,
        padding="some",
        with_bias=True,
        row_exact=True,
        counted=True,
        workspace=None,
        seed=0,
    ):
        """sparse_mlp against the reference, with NaN in fc2 rows of neurons that came out <= 0 in every row,
        too.
        """
        valid = self.rows(tokens, padding)
        x, fc1 = (
            self.rand(tokens, hidden, dtype=dtype, seed=seed),
            self.rand(ffn, hidden, seed=seed + 1, dtype=dtype, fan_in=hidden),
        )
        bias = self.rand(ffn, seed=seed + 2, dtype=dtype) if with_bias else None
        fc2_t = self.rand(ffn, hidden, seed=seed + 3, dtype=dtype, fan_in=ffn)
        mask = self.rand_mask(tokens, ffn, density=density, seed=seed) & valid[:, None]
        union = mask.any(0)
        h = x.double() @ fc1.double().t() + (bias.double() if with_bias else 0)
        alive = ((h > 0) & (mask if row_exact else union & valid[:, None])).any(0)
        found, expected = self.new_counters(counted), self.new_counters(counted)
        args = (
            # every other padded row holds numbers: NaN alone would hide behind `h > 0`
            poison(x, valid | (torch.arange(tokens, device=self.device) % 2 == 1)),
            poison(fc1, union),
            poison(bias, union) if with_bias else None,
            poison(fc2_t, alive),
            *reference.compact_union(mask),
            row_lens_of(valid),
            mask if row_exact else None,
            "relu",
        )
        out = self.kernels.sparse_mlp(*args, found, workspace)
        assert out.dtype == dtype and out[~valid].eq(0).all()
        assert_close(out, reference.sparse_mlp(*args, expected))
        if counted:
            assert torch.equal(found, expected) and found[4] == 104 + alive.sum()

    def sparse_mlp_of_single_neurons(self, dtype=torch.float32):
        """Segments that are empty, at either end too, shift no other: each single neuron, and one in each."""
        for chosen in (*([n] for n in (0, 127, 128, 255, 256, 299)), [0, 299], [5, 200], [127, 128, 256]):
            mask = torch.zeros(3, 300, dtype=torch.bool, device=self.device)
            mask[0, chosen] = True
            x, fc1, fc2_t = (
                self.rand(*s, seed=i, dtype=dtype, fan_in=f)
                for i, (s, f) in enumerate([((3, 16), 1), ((300, 16), 16), ((300, 16), 1)])
            )
            bias = self.rand(300, seed=5, dtype=dtype) + 9
            args = (
                x,
                poison(fc1, mask[0]),
                bias,
                poison(fc2_t, mask[0]),
                *reference.compact_union(mask),
                row_lens_of(self.rows(3, "none")),
            )
            assert_close(self.kernels.sparse_mlp(*args), reference.sparse_mlp(*args))

    def sparse_qkv(
        self,
        tokens,
        heads=4,
        kv_heads=4,
        head_size=16,
        hidden=72,
        dtype=torch.float32,
        density=0.3,
        padding="some",
        with_bias=True,
        counted=True,
        seed=0,
    ):
        """sparse_qkv against the reference; rows of padding may hold anything, but hold NaN in x and must not
        spread it.
        """
        valid, size = self.rows(tokens, padding), (heads + 2 * kv_heads) * head_size
        mask = self.rand_mask(tokens, heads, density=density, seed=seed) & valid[:, None]
        wanted = torch.ones(size, dtype=torch.bool, device=self.device)
        wanted[: heads * head_size] = mask.any(0).repeat_interleave(head_size)
        x = poison(self.rand(tokens, hidden, dtype=dtype, seed=seed), valid)
        weight = poison(self.rand(size, hidden, seed=seed + 1, dtype=dtype, fan_in=hidden), wanted)
        bias = poison(self.rand(size, seed=seed + 2, dtype=dtype), wanted) if with_bias else None
        found, expected = self.new_counters(counted), self.new_counters(counted)
        args = x, weight, bias, scores_of(mask), row_lens_of(valid), head_size
        out = self.kernels.sparse_qkv(*args, found)
        assert out.dtype == dtype and out[valid][:, ~wanted].eq(0).all()
        assert_close(out[valid], reference.sparse_qkv(*args, expected)[valid])
        if counted:
            assert torch.equal(found, expected)

    def sparse_out_proj(
        self,
        tokens,
        heads=4,
        head_size=16,
        hidden=72,
        dtype=torch.float32,
        density=0.3,
        padding="some",
        given_output=True,
        seed=0,
    ):
        """sparse_out_proj against the reference; it writes rows of padding too, with 0."""
        valid = self.rows(tokens, padding)
        mask = self.rand_mask(tokens, heads, density=density, seed=seed) & valid[:, None]
        attn = reference.mask_heads(
            self.rand(tokens, heads, head_size, dtype=dtype, seed=seed), scores_of(mask)
        )
        weight = self.rand(hidden, heads * head_size, seed=seed + 1, dtype=dtype, fan_in=heads * head_size)
        weight = poison(weight, mask.any(0).repeat_interleave(head_size), dim=1)
        output = torch.full((tokens, hidden), NAN, dtype=dtype, device=self.device) if given_output else None
        out = self.kernels.sparse_out_proj(attn, weight, scores_of(mask), output)
        assert out.dtype == dtype and (output is None or out is output)
        assert_close(out, reference.sparse_out_proj(attn, weight, scores_of(mask)))
        # a row of its own heads only
        assert out[~mask.any(1)].eq(0).all()

    def arguments(self, name, tokens=20, dtype=torch.float32):
        """Arguments of a function by name: everything selected, no padding, long enough to be cut in
        pieces.
        """
        ffn, rank, heads, head_size = 300, 20, 4, 16
        # enough for two pieces of the predictor
        hidden = 600 if name in ("score_heads", "select_neurons") else 100
        x, lens = self.rand(tokens, hidden, dtype=dtype), row_lens_of(self.rows(tokens, "none"))
        scores = torch.ones(tokens, heads, device=self.device)
        mask = torch.ones(tokens, ffn, dtype=torch.bool, device=self.device)
        ids, counts = reference.compact_union(mask)
        table = torch.arange(tokens * 10, dtype=torch.int32, device=self.device).view(tokens, 10)
        head_predictor = (
            self.rand(heads, hidden, seed=4, dtype=dtype, fan_in=hidden),
            self.rand(heads, seed=5),
        )
        mlp = {
            "x": x,
            "fc1_weight": self.rand(ffn, hidden, seed=1, dtype=dtype, fan_in=hidden),
            "fc1_bias": self.rand(ffn, seed=2, dtype=dtype),
            "fc2_weight_t": self.rand(ffn, hidden, seed=3, dtype=dtype, fan_in=ffn),
        }
        return {
            "score_heads": {"x": x, "weight": head_predictor[0], "bias": head_predictor[1], "row_lens": lens},
            "select_neurons": {
                "x": x,
                "down": self.rand(rank, hidden, seed=1, dtype=dtype, fan_in=hidden),
                "up": self.rand(ffn, rank, seed=2, dtype=dtype, fan_in=rank),
                "bias": self.rand(ffn, seed=3),
                "row_lens": lens,
                "with_row_mask": True,
                "heads": (x, *head_predictor),
            },
            "sparse_mlp": {**mlp, "neuron_ids": ids, "counts": counts, "row_lens": lens, "row_mask": mask},
            "dense_mlp": mlp,
            "linear": {"x": x, "weight": mlp["fc1_weight"], "bias": mlp["fc1_bias"]},
            "sparse_qkv": {
                "x": x,
                "weight": self.rand(8 * head_size, hidden, seed=1, dtype=dtype, fan_in=hidden),
                "bias": self.rand(8 * head_size, seed=2, dtype=dtype),
                "head_scores": scores,
                "row_lens": lens,
                "head_size": head_size,
            },
            "sparse_out_proj": {
                "attn": self.rand(tokens, heads, head_size, dtype=dtype),
                "weight": self.rand(hidden, heads * head_size, seed=1, dtype=dtype),
                "head_scores": scores,
            },
            "paged_attention": {
                "query": self.rand(tokens, heads, head_size, dtype=dtype),
                "kv_cache": self.rand(tokens * 10, 2, 16, 2 * head_size, seed=1, dtype=dtype),
                "block_table": table,
                "seq_lens": (140 + lens).clamp(max=160),
                "scale": 0.3,
                "head_scores": scores,
            },
        }[name]


# Changes that make an argument wrong


def as_int64(tensor):
    return tensor.long()


def as_half(tensor):
    return tensor.half()


def one_less(tensor):
    return tensor[:-1]


def narrower(tensor):
    return tensor[..., :-1].contiguous()


def column_major(tensor):
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def wider_strides(tensor):
    return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]


def same_bits(some, other):
    return all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(some, other, strict=True))
