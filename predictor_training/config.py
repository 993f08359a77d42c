"""The settings of a training run: everything that decides the artifact."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_dejavu import artifact
from vllm_dejavu.config import LOOKAHEADS
from vllm_dejavu.predictor_training import forms, labels

MODEL_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEAD_FORMS = ("closed_form", "paper")
LOSSES = ("bce", "energy")


@dataclass(frozen=True)
class TrainConfig:
    """What to train on, how, and within which limits.

    Attributes:
        data: files or dataset ids, or ["self"]: text sampled from the model. valid_data: separate held-out
            text, or a share `valid_share` of the documents of `data` is held out.
        max_tokens: training tokens; None takes the paper's 500 sequences of the model's context.
            valid_tokens: for calibration.
        rank: of the MLP predictors; None takes 3% of the MLP's bytes, for hidden sizes below 2048 a quarter
            of the hidden size.
        form: of the MLP predictors (`forms.FORMS` or module:attribute); gradient_tokens: at most, that forms
            which train by gradient see, drawn evenly; head_form: `closed_form`, or `paper`: trained by
            gradient on the paper's labels, the top `head_share` by norm. loss: `energy` weighs a missed
            neuron by what it would have added.
        neuron_label, energy_share, head_label: `labels.Labels`.
        max_ppl_increase: perplexity budget of the calibration.
        max_memory, max_disk: bytes, of the moments and of stored activations; less memory means more passes
            over the text, less disk fewer of the tokens.
        device: one, or "auto" to spread the model by accelerate. model_dtype: that the model computes in.
    """

    model: str
    data: tuple[str, ...]
    output: str
    valid_data: tuple[str, ...] = ()
    field: str = "text"
    valid_share: float = 0.1
    max_documents: int | None = None
    max_tokens: int | None = None
    valid_tokens: int = 32_768
    seq_len: int | None = None
    rank: int | None = None
    form: str = "finetuned"
    gradient_tokens: int = 32_768
    head_form: str = "closed_form"
    head_share: float = 0.3
    loss: str = "energy"
    neuron_label: str = "positive"
    energy_share: float = 0.99
    head_label: str = "contribution"
    mlp_lookahead: str = "self"
    head_lookahead: str = "previous"
    dtype: str = "int8"
    max_ppl_increase: float = 0.01
    max_memory: int | None = None
    max_disk: int | None = None
    batch: int = 4
    seed: int = 0
    device: str = "cpu"
    model_dtype: str = "float32"

    def __post_init__(self) -> None:
        def or_low(value: int | None, low: int) -> int:
            return low if value is None else value

        for name, value, low, high in (
            ("valid_share", self.valid_share, 0.001, 0.9),
            ("max_tokens", or_low(self.max_tokens, 1), 1, 10**12),
            ("valid_tokens", self.valid_tokens, 1, 10**10),
            ("batch", self.batch, 1, 10**6),
            ("seed", self.seed, 0, 2**31 - 1),
            ("max_ppl_increase", self.max_ppl_increase, 0, 10),
            ("rank", or_low(self.rank, 1), 1, 10**6),
            ("seq_len", or_low(self.seq_len, 2), 2, 10**6),
            ("max_documents", or_low(self.max_documents, 1), 1, 10**12),
            ("energy_share", self.energy_share, 0.01, 1),
            ("head_share", self.head_share, 0.01, 1),
            ("gradient_tokens", self.gradient_tokens, 1, 10**12),
            ("max_memory", or_low(self.max_memory, 1), 1, 10**15),
            ("max_disk", or_low(self.max_disk, 1), 1, 10**15),
        ):
            if not low <= value <= high:
                raise ValueError(
                    f"--{name.replace('_', '-')} {value} is out of range: expected {low} to {high}."
                )
        if not self.output.strip():
            raise ValueError("--output is empty: name a directory.")
        for name, value, allowed in (
            ("mlp_lookahead", self.mlp_lookahead, LOOKAHEADS["mlp"]),
            ("head_lookahead", self.head_lookahead, LOOKAHEADS["attention"]),
            ("dtype", self.dtype, sorted(artifact.DTYPES)),
            ("model_dtype", self.model_dtype, sorted(MODEL_DTYPES)),
            ("head_form", self.head_form, HEAD_FORMS),
            ("loss", self.loss, LOSSES),
            ("neuron_label", self.neuron_label, labels.NEURON_LABELS),
            ("head_label", self.head_label, labels.HEAD_LABELS),
        ):
            if value not in allowed:
                raise ValueError(
                    f"--{name.replace('_', '-')} {value!r} is unknown: expected one of {list(allowed)}."
                )
        if forms.get(self.form).own_input and self.mlp_lookahead != "self":
            raise ValueError(
                f"--form {self.form} is for --mlp-lookahead self only, found {self.mlp_lookahead!r}."
            )

    @property
    def lookahead(self) -> dict[str, str]:
        return {"mlp": self.mlp_lookahead, "attention": self.head_lookahead}

    @property
    def lookaheads(self) -> dict[str, tuple[str, ...]]:
        """As `collect.Request` has them."""
        return {block: (lookahead,) for block, lookahead in self.lookahead.items()}

    @property
    def needs_samples(self) -> bool:
        return forms.get(self.form).needs_samples or self.head_form == "paper"
