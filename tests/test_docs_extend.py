"""The example of docs/extend.md is run as it stands there."""

import re
import sys
from pathlib import Path

import pytest
import tiny
import torch

from vllm_dejavu import artifact
from vllm_dejavu.predictor_training import forms, pipeline
from vllm_dejavu.predictor_training.collect import Collector, Request
from vllm_dejavu.predictor_training.hf_model import HfModel
from vllm_dejavu.predictor_training.train import LayerWeights, fit_mlp

PAGE = Path(__file__).parent.parent / "docs" / "extend.md"


@pytest.fixture
def pca(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S).group(1)
    (tmp_path / "pca_form.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "pca_form:FORM"
    sys.modules.pop("pca_form", None)


def test_example_trains_an_artifact(pca, tmp_path):
    model = tiny.make_opt(tmp_path / "model")
    config = pipeline.TrainConfig(
        model=str(model),
        data=("self",),
        output=str(tmp_path / "out"),
        form=pca,
        seq_len=64,
        max_tokens=2048,
        valid_tokens=512,
        rank=32,
        max_ppl_increase=0.5,
    )
    made = pipeline.run(config)
    assert made.manifest.training["form"] == pca
    assert any(layer["mlp"].sparse for layer in artifact.load(tmp_path / "out").manifest.layers)


def test_example_at_full_rank_is_least_squares(pca, tmp_path):
    """With all components nothing is left out: scores are the pre-activations, scaled."""
    opt = HfModel(str(tiny.make_opt(tmp_path / "model")))
    tokens = torch.randint(3, tiny.VOCAB, (12, 40), generator=torch.Generator().manual_seed(1))
    moments = Collector(opt, Request({"mlp": ("attn_input",), "attention": ("self",)}, range(3))).run(
        tokens, 4, progress=lambda n: None
    )
    inputs = []
    with opt.observed(
        on_mlp=lambda layer, states, z: (
            inputs.append(states.attn_input.double().clone()) if layer == 1 else None
        )
    ):
        opt.decoder(tokens)
    hidden = opt.geometry.hidden_size
    scores = []
    for name in (pca, "closed_form"):
        fitted = fit_mlp(moments, 1, LayerWeights.of(opt, 1), "attn_input", hidden, forms.get(name))
        scores.append(inputs[0] @ (fitted.up @ fitted.down).T + fitted.bias)
    # Each form scales scores by its own residual; the closed form's ridge leaves a little.
    ratio = (scores[0] * scores[1]).sum(0) / (scores[0].norm(dim=0) * scores[1].norm(dim=0))
    assert ratio.min() > 0.999
