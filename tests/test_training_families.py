"""Training of another family takes its entry in `families` and nothing else: here a small random Nemotron,
with grouped queries, heads whose sizes do not add up to the hidden size, no biases, rotary positions, ReLU².
"""

import pytest
import tiny
import torch

from vllm_dejavu.predictor_training.calibrate import CalibrationSettings, Calibrator
from vllm_dejavu.predictor_training.collect import Collector, Request
from vllm_dejavu.predictor_training.describe import describe
from vllm_dejavu.predictor_training.hf_model import HfModel
from vllm_dejavu.predictor_training.labels import Labels, neuron_energy
from vllm_dejavu.predictor_training.masked import Masked
from vllm_dejavu.predictor_training.train import FitSettings, LayerWeights, fit_layer

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_SIZE = 3, 64, 320, 4, 2, 32
LOOKAHEAD = {"mlp": "self", "attention": "previous"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("nemotron")
    sizes = {"hidden": HIDDEN, "heads": HEADS, "kv_heads": KV_HEADS, "head_size": HEAD_SIZE}
    return HfModel(str(tiny.make_nemotron(directory, layers=LAYERS, **sizes)))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, tiny.VOCAB, (12, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("start", range(LAYERS + 1))
def test_nll_from_any_layer_is_what_hugging_face_computes(model, tokens, start):
    with torch.inference_mode():
        logits = model.model(tokens).logits[:, :-1].transpose(1, 2)
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none")
    run = model.start(tokens)
    for _ in range(start):
        run = model.advance(run)
    assert torch.allclose(model.nll_from(run), expected, atol=1e-4)


def test_what_is_observed_is_what_the_projections_are_given(model, tokens):
    """Pre-activations in front of the activation, attention outputs head by head in front of the output
    projection.
    """
    seen, layer = {}, model.layers[1]
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.update(activations=args[0])),
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: seen.update(attn=args[0])),
    ]
    kept = {}

    def on_attention(index, states, attn):
        if index == 1:
            kept.update(attn=attn.clone(), attn_input=states.attn_input.clone())

    def on_mlp(index, states, z):
        if index == 1:
            kept.update(z=z.clone(), mlp_input=states.mlp_input.clone())

    with model.observed(on_attention, on_mlp):
        model.decoder(tokens)
    for hook in hooks:
        hook.remove()
    rows = tokens.numel()
    assert kept["attn"].shape == (rows, HEADS, HEAD_SIZE) and kept["z"].shape == (rows, FFN)
    assert torch.equal(kept["attn"].flatten(1), seen["attn"].reshape(rows, -1))
    assert torch.equal(kept["z"].relu().square(), seen["activations"].reshape(rows, -1))
    assert kept["attn_input"].shape == kept["mlp_input"].shape == (rows, HIDDEN)
    assert model.head_grams(1).shape == (HEADS, HEAD_SIZE, HEAD_SIZE)


def test_predictors_are_fitted_and_calibrated(model, tokens):
    """Without a bias, with a LayerNorm of its own kind: gates within their budget, in every block's units."""
    request = Request({block: (name,) for block, name in LOOKAHEAD.items()}, range(LAYERS))
    moments = Collector(model, request).run(tokens, 4, progress=lambda n: None)
    weights = [LayerWeights.of(model, i) for i in range(LAYERS)]
    norms = [layer.post_attention_layernorm.weight.double() for layer in model.layers]
    assert all(torch.equal(w.norm_weight, 1 + norm) for w, norm in zip(weights, norms, strict=True))
    assert all(not w.fc1_bias.any() for w in weights)
    fitted = [fit_layer(FitSettings(16, LOOKAHEAD), moments, i, w) for i, w in enumerate(weights)]
    gates, record = Calibrator(model, fitted, tokens, CalibrationSettings(LOOKAHEAD, 0.1, "int8", 4)).run()
    rise = Masked(model, gates).nll(tokens, 4) - Masked(model, {}).nll(tokens, 4)
    assert 0 < len(gates) and torch.tensor(rise).expm1() <= 0.1 + 1e-6
    assert record["ppl_increase"] == pytest.approx(float(torch.tensor(rise).expm1()), abs=1e-5)
    specs, _ = describe(model, gates, tokens, 4, seed=0)
    assert len(specs) == 2 * LAYERS
    for (layer, block), gate in gates.items():
        assert specs[layer, block].sparse and 0 < specs[layer, block].density["mean"] < 1
        assert len(gate.tensors["bias"]) == model.geometry.units(block)


def test_energies_are_those_of_the_activation():
    """A neuron of ReLU² adds its square; which neurons hold most of the energy depends on it."""
    z, norms = torch.tensor([[-1.0, 0.5, 2.0, 1.2]]), torch.tensor([1.0, 2.0, 3.0, 1.0])
    assert torch.equal(neuron_energy(z, norms), torch.tensor([[0.0, 1.0, 6.0, 1.2]]))
    assert torch.allclose(neuron_energy(z, norms, "relu2"), torch.tensor([[0.0, 0.5, 12.0, 1.44]]))
    kept = {
        activation: Labels("energy", 0.96, activation=activation).active(z, norms)[0].tolist()
        for activation in ("relu", "relu2")
    }
    assert kept == {"relu": [False, False, True, True], "relu2": [False, False, True, False]}
