"""Gates as training runs them: a predictor at one operating point, in the form in which artifacts hold it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vllm_dejavu.artifact import DTYPES, Artifact
from vllm_dejavu.manifest import FORMS, GateSpec
from vllm_dejavu.predictor import Predictor, quantize
from vllm_dejavu.predictor_training.forms import FittedMlp
from vllm_dejavu.predictor_training.hf_model import LayerStates
from vllm_dejavu.predictor_training.train import FittedHeads

Key = tuple[int, str]  # layer, block


@dataclass(eq=False)
class Gate:
    """One gate.

    Attributes:
        spec, tensors: as the artifact holds them; what `describe` measures is not in the spec before that.
    """

    block: str
    spec: GateSpec
    tensors: dict[str, torch.Tensor]
    predictor: Predictor = field(init=False)

    def __post_init__(self) -> None:
        self.predictor = Predictor(self.tensors)

    def scores(self, states: LayerStates, value: torch.Tensor) -> torch.Tensor:
        """[T, units]; positive is selected. value: the block's pre-activations or attention output, which
        only an oracle may read.
        """
        x = states.gate_input(self.block, self.spec.lookahead)
        return self.predictor.to(x.device).scores(x)


def stored(tensors: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """A predictor's tensors as an artifact of this dtype holds them: biases and rates in fp32, weights in
    `dtype`.
    """
    tensors = {k: v.float() if k in ("bias", "activation_rate") else v for k, v in tensors.items()}
    if dtype == "int8":
        return quantize(tensors, 8)
    return {k: v if k in ("bias", "activation_rate") else v.to(DTYPES[dtype]) for k, v in tensors.items()}


def make_mlp_gate(fitted: FittedMlp, margin: float, lookahead: str, dtype: str) -> Gate:
    """Fold the margin into the bias."""
    spec = GateSpec(
        state="sparse",
        form=FORMS["mlp"],
        lookahead=lookahead,
        rank=len(fitted.down),
        dtype=dtype,
        margin=margin,
    )
    tensors = {
        "down": fitted.down,
        "up": fitted.up,
        "bias": fitted.bias + margin,
        "activation_rate": fitted.activation_rate,
    }
    return Gate("mlp", spec, stored(tensors, dtype))


def make_head_gate(
    fitted: FittedHeads, cut: float, threshold: float, rate: torch.Tensor, lookahead: str, dtype: str
) -> Gate:
    """A head is selected when its predicted score exceeds `cut`; it is truly active when its contribution
    exceeds `threshold`.
    """
    spec = GateSpec(
        state="sparse",
        form=FORMS["attention"],
        lookahead=lookahead,
        rank=0,
        dtype=dtype,
        threshold=threshold,
    )
    tensors = {"weight": fitted.weight, "bias": fitted.bias - cut, "activation_rate": rate}
    return Gate("attention", spec, stored(tensors, dtype))


def gates_of(loaded: Artifact) -> dict[Key, Gate]:
    """An artifact's gates; dense blocks are absent."""
    return {
        (layer, block): Gate(block, *loaded.gate(layer, block))
        for layer, specs in enumerate(loaded.manifest.layers)
        for block, spec in specs.items()
        if spec.sparse
    }
