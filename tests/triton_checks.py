"""The Triton kernels as their tests take them: on a GPU if there is one, else under Triton's interpreter."""

import contextlib
from unittest.mock import patch

import pytest
import torch
from fuzz import fuzz
from hypothesis import Phase
from kernel_checks import (
    PADDINGS,
    Checks,
)
from kernel_flat import Flat
from kernel_inputs import DENSITIES
from tolerances import DTYPE_IDS, DTYPES

from vllm_dejavu.kernels import gpu, tables

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# No shrinking: it takes minutes under the interpreter, and the sizes are small already.
FUZZ = fuzz(40, phases=[Phase.explicit, Phase.generate])
# One token has kernels of its own; then each tile from both sides, and more tokens than the largest tile
# takes.
TOKENS = [1, 2, 5, 16, 17, 33, 64, 70]
# All of them in fp32; the other types, which differ in the tiles' contents alone, with each kind of kernel.
SOME = [(tokens, dtype) for dtype in DTYPES for tokens in (TOKENS if dtype == torch.float32 else (1, 5, 70))]
some_tokens_and_dtypes = pytest.mark.parametrize(
    ("tokens", "dtype"), SOME, ids=[f"{n}-tokens-{DTYPE_IDS[DTYPES.index(dtype)]}" for n, dtype in SOME]
)

triton_kernels = Flat(gpu.KERNELS)
checks = Checks(triton_kernels, DEVICE)
rand = checks.rand


def multiprocessors(number):
    """Grids as on a chip of this size; None: as they are."""
    return (
        contextlib.nullcontext() if number is None else patch.object(tables, "num_sms", lambda device: number)
    )


# Every density meets every padding with few tokens; one token and two blocks of tokens meet each of them
# once.
densities_and_paddings = pytest.mark.parametrize(
    ("tokens", "density", "padding"),
    [(4, density, padding) for density in DENSITIES for padding in PADDINGS]
    + [
        (tokens, density, padding)
        for tokens in (1, 70)
        for density, padding in zip(DENSITIES, PADDINGS, strict=True)
    ],
    ids=lambda value: (
        {4: "few-tokens", 1: "one-token", 70: "two-token-blocks"}.get(value) if type(value) is int else None
    ),
)
