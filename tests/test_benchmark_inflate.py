"""Inflated models: widened, they give the same logits, selections, densities and recall."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import inflate
import pytest
import torch
from engine import TOLERANCE as ENGINE_TOLERANCE
from engine import Recorder, engine, metrics_of, model_of, next_token_log_probs, random_prompt, run_requests
from kernel_flat import flat_reference as reference
from safetensors.torch import load_file
from tiny import make_artifact, make_nemotron, make_opt, rewrite_tensors
from tolerances import RELATIVE_RMS, relative_rms
from transformers import AutoConfig, AutoModelForCausalLM, OPTForCausalLM

from vllm_dejavu import artifact, selection
from vllm_dejavu.manifest import TENSORS_FILE, ArtifactError, ModelSpec, check_fingerprint, check_model
from vllm_dejavu.predictor_training import hf_model
from vllm_dejavu.published import GEOMETRIES

SEED = 5
TOLERANCE = RELATIVE_RMS[torch.float32]
TOKENS = 64
BLOCKS = ("mlp", "attention")
# A score this close to 0, as a share of its layer's spread, may come out on either side: sums run in another
# order.
ROUNDING = 1e-5


@dataclass
class Pair:
    """A model and its inflated copy, in float32."""

    original: Path
    inflated: Path
    factor: int

    @property
    def copies(self) -> inflate.Copies:
        return inflate.Copies.draw(AutoConfig.from_pretrained(self.original), self.factor, SEED)

    def sources(self, layer: int, block: str) -> torch.Tensor:
        return (self.copies.neurons if block == "mlp" else self.copies.heads)[layer]


CASES = {
    "int8_x2": {
        "factor": 2,
        "dtype": "int8",
        "mlp": "self",
        "attention": "previous",
        "hidden": 128,
        "heads": 4,
    },
    "float16_x3": {
        "factor": 3,
        "dtype": "float16",
        "mlp": "attn_input",
        "attention": "self",
        "hidden": 64,
        "heads": 2,
    },
    "previous_x3": {
        "factor": 3,
        "dtype": "int8",
        "mlp": "previous",
        "attention": "previous",
        "hidden": 96,
        "heads": 3,
    },
    "nemotron_x2": {
        "factor": 2,
        "dtype": "int8",
        "mlp": "self",
        "attention": "previous",
        "make": make_nemotron,
        "hidden": 64,
        "heads": 4,
    },
    "books_x2": {"factor": 2},
}


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory) -> Pair:
    case, root = dict(CASES[request.param]), tmp_path_factory.mktemp(request.param)
    factor = case.pop("factor")
    original = inflate.DEFAULT_MODEL
    if case:
        make = case.pop("make", make_opt)
        original = make(root / "original", hidden=case.pop("hidden"), heads=case.pop("heads"))
        make_artifact(
            original / "dejavu",
            original,
            density=0.3,
            union_density={"8": {"mean": 0.6, "upper": 0.7}},
            **case,
        )
    return Pair(original, inflate.inflate(original, root / "inflated", factor, torch.float32, SEED), factor)


@dataclass
class Run:
    """What a dense pass over TOKENS tokens showed, by (layer, block)."""

    # hidden states that fed the gates
    inputs: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    scores: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    contributions: dict[int, torch.Tensor] = field(default_factory=dict)
    pre_activations: dict[int, torch.Tensor] = field(default_factory=dict)


def observe(directory: Path) -> Run:
    opt, loaded, run = hf_model.HfModel(str(directory)), artifact.load(directory / "dejavu"), Run()

    def gate(layer: int, block: str, states: hf_model.LayerStates) -> None:
        spec, t = loaded.gate(layer, block)
        if spec.sparse:
            x = run.inputs[layer, block] = states.gate_input(block, spec.lookahead)
            low_rank = block == "mlp"
            run.scores[layer, block] = (
                reference.low_rank_scores(x, t["down"], t["up"], t["bias"])
                if low_rank
                else reference.linear_scores(x, t["weight"], t["bias"])
            )

    def on_attention(layer: int, states: hf_model.LayerStates, attn: torch.Tensor) -> None:
        grams = opt.head_grams(layer)
        run.contributions[layer] = selection.head_contributions(attn, grams)
        gate(layer, "attention", states)

    def on_mlp(layer: int, states: hf_model.LayerStates, z: torch.Tensor) -> None:
        run.pre_activations[layer] = z
        gate(layer, "mlp", states)

    with opt.observed(on_attention, on_mlp):
        opt.decoder(tokens())
    return run


def tokens() -> torch.Tensor:
    return torch.tensor([random_prompt(TOKENS)])


@pytest.fixture(scope="module")
def runs(pair) -> tuple[Run, Run]:
    return observe(pair.original), observe(pair.inflated)


@torch.inference_mode()
def logits(directory: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()(tokens()).logits


def test_logits_are_the_same(pair):
    """Guards every rule of the widening at once: what reads copies is divided, biases and norms are copied,
    the last norm is divided.
    """
    config, wide = (AutoConfig.from_pretrained(d) for d in (pair.original, pair.inflated))
    for name in inflate.FORMS[config.model_type].widened:
        assert getattr(wide, name) == pair.factor * getattr(config, name)
    expected, found = logits(pair.original), logits(pair.inflated)
    assert expected.std(dim=-1).min() > 0.1, "the logits say nothing"
    error = relative_rms(found, expected)
    print(f"relative RMS error of the logits: {error:.1e}")
    assert error < TOLERANCE


def test_every_parameter_matters_to_the_logits(tmp_path):
    """The comparison above must see each kind of weight: on the tiny model none is 0 or 1, where a forgotten
    rule would not show.
    """
    model = OPTForCausalLM.from_pretrained(make_opt(tmp_path / "opt"))
    for name, p in model.named_parameters():
        assert p.std() > 0.05 and (p.ndim > 1 or p.abs().min() > 0), name


def test_gates_select_the_copies_of_what_they_selected(pair, runs):
    """Same lookahead, same hidden states, factor times the scores: a unit's copies are selected exactly when
    it was.
    """
    original, inflated = runs
    assert original.scores.keys() == inflated.scores.keys() and original.scores, "no gate was compared"
    rounding = 0
    for (layer, block), scores in original.scores.items():
        sources = pair.sources(layer, block)
        assert (
            relative_rms(
                inflated.inputs[layer, block], original.inputs[layer, block][:, pair.copies.channels]
            )
            < TOLERANCE
        )
        assert relative_rms(inflated.scores[layer, block], pair.factor * scores[:, sources]) < TOLERANCE
        expected, found = (scores > 0)[:, sources], inflated.scores[layer, block] > 0
        assert 0 < expected.float().mean() < 1, f"layer {layer} {block} selects all or nothing"
        close = (scores.abs() < ROUNDING * scores.std())[:, sources]
        assert torch.equal(expected[~close], found[~close])
        rounding += int((expected != found).sum())
    print(f"selections within rounding of 0 that differ: {rounding}")
    assert rounding <= 2 * pair.factor


def test_neurons_fire_where_their_originals_do(pair, runs):
    """Pre-activations are copied, not scaled: natural density, survivors of fc1 and recall stay."""
    original, inflated = runs
    for layer, z in original.pre_activations.items():
        assert relative_rms(inflated.pre_activations[layer], z[:, pair.copies.neurons[layer]]) < TOLERANCE


def test_head_contributions_and_thresholds_scale_alike(pair, runs):
    """A copy adds 1/factor to factor copies of each channel: norms and thresholds shrink by sqrt(factor), so
    the same heads are active.
    """
    original, inflated = runs
    before, after = (artifact.load(d / "dejavu").manifest.layers for d in (pair.original, pair.inflated))
    for layer, norms in original.contributions.items():
        sources = pair.sources(layer, "attention")
        assert (
            relative_rms(inflated.contributions[layer], norms[:, sources] / math.sqrt(pair.factor))
            < TOLERANCE
        )
        if not before[layer]["attention"].sparse:
            continue
        threshold = before[layer]["attention"].threshold
        assert after[layer]["attention"].threshold == pytest.approx(threshold / math.sqrt(pair.factor))
        middle = float(norms.median())  # the tiny artifacts' own threshold is below every norm
        for cut in (threshold, middle * (1 + 1e-4)):
            assert torch.equal(
                inflated.contributions[layer] > cut / math.sqrt(pair.factor), (norms > cut)[:, sources]
            )


def test_artifact_is_that_of_the_new_weights(pair):
    """It loads, fits geometry and weights as vLLM checks them, keeps its densities, and says that it was
    inflated.
    """
    loaded, original = (
        artifact.load(pair.inflated / "dejavu"),
        artifact.load(pair.original / "dejavu").manifest,
    )
    found = hf_model.fingerprint(str(pair.inflated))
    spec = ModelSpec.from_hf_config(AutoConfig.from_pretrained(pair.inflated), "inflated", found)
    check_model(loaded.manifest, spec)
    check_fingerprint(loaded.manifest, found, "inflated")
    with pytest.raises(ArtifactError, match="weights of"):
        check_fingerprint(loaded.manifest, hf_model.fingerprint(str(pair.original)), "the original")
    for gates, wide in zip(original.layers, loaded.manifest.layers, strict=True):
        for block in BLOCKS:
            assert replace(wide[block], threshold=gates[block].threshold) == gates[block]
    record = loaded.manifest.calibration
    assert record["inflated"] is True and record["inflated_factor"] == pair.factor
    assert {k: v for k, v in record.items() if k in original.calibration} == original.calibration
    assert f"inflated x{pair.factor}" in loaded.manifest.model.name


def test_predictor_weights_are_copied_as_stored(pair):
    """int8 integers stay integers: no gate's weights are scaled, in any dtype."""
    original, inflated = (load_file(d / "dejavu" / TENSORS_FILE) for d in (pair.original, pair.inflated))
    assert original.keys() == inflated.keys()
    for name in (n for n in original if n.endswith(("down", "up", "weight"))):
        assert inflated[name].dtype == original[name].dtype
        assert torch.equal(inflated[name].unique(), original[name].unique())


def neighbours(sources: torch.Tensor) -> int:
    return int((sources[1:] == sources[:-1]).sum())


def rows_alike(weight: torch.Tensor) -> int:
    return int((weight[1:] == weight[:-1]).all(dim=1).sum())


def test_copies_do_not_lie_side_by_side(tmp_path):
    """Else a selection would be read in blocks. Shuffled, factor - 1 pairs of neighbours are copies by
    chance; side by side most would be.
    """
    factor = 4
    model = make_opt(tmp_path / "opt", hidden=128, heads=8, layers=2)
    config = AutoConfig.from_pretrained(model)
    weights = load_file(
        inflate.inflate(model, tmp_path / "wide", factor, torch.float32, SEED) / "model.safetensors"
    )
    allowed = 4 * factor
    assert rows_alike(weights["model.decoder.embed_tokens.weight"].t()) <= allowed
    for layer in range(2):
        assert rows_alike(weights[f"model.decoder.layers.{layer}.fc1.weight"]) <= allowed
        assert rows_alike(weights[f"model.decoder.layers.{layer}.fc2.weight"].t()) <= allowed
        per_head = weights[f"model.decoder.layers.{layer}.self_attn.v_proj.weight"].view(factor * 8, -1)
        assert rows_alike(per_head) <= 3 * factor < (factor - 1) * 8
    copies = inflate.Copies.draw(config, factor, SEED)
    for sources, units in (
        (copies.channels, 128),
        *((n, 512) for n in copies.neurons),
        *((h, 8) for h in copies.heads),
    ):
        assert torch.equal(sources.bincount(), torch.full((units,), factor)), (
            "an original is missing or there too often"
        )
        assert neighbours(sources) <= allowed
    assert not torch.equal(*copies.neurons) and not torch.equal(*copies.heads), "layers are shuffled alike"
    assert not torch.equal(copies.channels, inflate.Copies.draw(config, factor, SEED + 1).channels)


def test_powers_of_two_round_nothing_in_bfloat16(tmp_path):
    """The shipped bfloat16 weights, widened in bfloat16, are those divided by 8, to the bit: quality differs
    by the sparsity alone.
    """
    original = load_file(inflate.DEFAULT_MODEL / "model.safetensors")
    inflate.main(["--geometry", "1.3b", "--output", str(tmp_path / "wide"), "--seed", str(SEED)])
    copies = inflate.Copies.draw(AutoConfig.from_pretrained(inflate.DEFAULT_MODEL), 8, SEED)
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert wide.keys() == original.keys()
    assert {t.dtype for t in wide.values()} == {torch.bfloat16}
    layer = "model.decoder.layers.3."
    expected = original[f"{layer}fc1.weight"][copies.neurons[3]][:, copies.channels]
    assert torch.equal(8 * wide[f"{layer}fc1.weight"], expected)
    assert torch.equal(
        8 * wide[f"{layer}fc2.weight"], original[f"{layer}fc2.weight"][copies.channels][:, copies.neurons[3]]
    )
    assert torch.equal(
        8 * wide["model.decoder.final_layer_norm.bias"],
        original["model.decoder.final_layer_norm.bias"][copies.channels],
    )

    # The rest of what the command writes: OPT-1.3B's width, a labelled card, what generation needs, a
    # readable file.
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    target = GEOMETRIES["1.3b"]
    assert (config["hidden_size"], config["ffn_dim"], config["num_attention_heads"]) == (
        target.hidden_size,
        target.ffn_dim,
        target.num_heads,
    )
    assert config["num_hidden_layers"] == 6 and config["dtype"] == "bfloat16"
    card = (tmp_path / "wide" / "README.md").read_text()
    assert "# opt-books-7m, inflated x8" in card and "Depth is not inflated" in card
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "wide" / name).read_bytes() == (inflate.DEFAULT_MODEL / name).read_bytes()
    assert (tmp_path / "wide" / "model.safetensors").stat().st_mode & 0o077 == 0o044


def test_without_an_artifact_the_weights_alone(tmp_path):
    wide = inflate.inflate(make_opt(tmp_path / "opt"), tmp_path / "wide", 2, torch.float32)
    assert not (wide / "dejavu").exists() and "dejavu/" not in (wide / "README.md").read_text()
    assert relative_rms(logits(wide), logits(tmp_path / "opt")) < TOLERANCE


@pytest.mark.parametrize("prefix", ["decoder.", "model.decoder."])
def test_older_names_of_tensors(tmp_path, prefix):
    """facebook's checkpoints leave out `model.`, and some store the tied lm_head too."""
    model = make_opt(tmp_path / "opt")

    def rename(tensors: dict) -> None:
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.decoder.")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors[f"{prefix}embed_tokens.weight"].clone()

    path = model / "model.safetensors"
    expected = logits(model)
    path.rename(model / TENSORS_FILE)
    rewrite_tensors(model, rename)
    (model / TENSORS_FILE).rename(path)
    wide = inflate.inflate(model, tmp_path / "wide", 2, torch.float32)
    assert "lm_head.weight" not in load_file(wide / "model.safetensors")
    assert relative_rms(logits(wide), expected) < TOLERANCE


class TestServed:
    """The engine on the tiny model and on the inflated one, each finding its artifact in MODEL/dejavu."""

    PROMPTS = {"short": random_prompt(5), "long": random_prompt(17, seed=1)}
    NEW_TOKENS = 16

    @pytest.fixture(scope="class")
    def served(self, tmp_path_factory) -> tuple[Pair, list[tuple]]:
        """The pair in float32, and [(steps, metrics, architecture)] of each, fed the same random text.

        Of its own accord a tied random model repeats a token, and nothing could differ.
        """
        root = tmp_path_factory.mktemp("served")
        original = make_opt(root / "original", hidden=64, heads=2)
        make_artifact(original / "dejavu", original, density=0.4, dtype="int8", attention="previous")
        # A threshold among the contributions, so that recall is neither 0 nor 1.
        norms = observe(original).contributions
        loaded = artifact.load(original / "dejavu")
        layers = tuple(
            {**g, "attention": replace(g["attention"], threshold=float(norms[i].median()))}
            for i, g in enumerate(loaded.manifest.layers)
        )
        artifact.save(
            original / "dejavu", replace(loaded.manifest, layers=layers), loaded.tensors, overwrite=True
        )
        pair = Pair(original, inflate.inflate(original, root / "inflated", 2, torch.float32, SEED), 2)
        return pair, [self._serve(model) for model in (pair.original, pair.inflated)]

    def _serve(self, model: Path) -> tuple:
        texts = {
            name: prompt + random_prompt(self.NEW_TOKENS + 1, seed=2 + i)[1:]
            for i, (name, prompt) in enumerate(self.PROMPTS.items())
        }
        with engine(model, dejavu={"measure": True}) as llm, Recorder(llm, texts) as recorder:
            found = run_requests(llm, {0: self.PROMPTS}, self.NEW_TOKENS)
            assert {name: self.PROMPTS[name] + tokens for name, tokens in found.items()} == texts, (
                "the forced tokens were not taken"
            )
            return recorder.steps, metrics_of(llm), type(model_of(llm)).__name__

    def test_same_log_probabilities_and_choices(self, served):
        _, ((steps, *_), (found_steps, counted, architecture)) = served
        assert architecture == "DejaVuOPTForCausalLM" and counted["artifact"]["fingerprint_verified"]
        expected, found = next_token_log_probs(steps), next_token_log_probs(found_steps)
        assert found.keys() == expected.keys() and len(expected) == len(self.PROMPTS) * self.NEW_TOKENS
        assert max(relative_rms(found[k], expected[k]) for k in expected) < ENGINE_TOLERANCE["float32"]
        choices = [int(v.argmax()) for v in expected.values()]
        assert [int(v.argmax()) for v in found.values()] == choices
        assert len(set(choices)) > self.NEW_TOKENS / 2, "the choices say nothing"

    def test_same_selections(self, served):
        """The sparse path selects the copies of what it selected."""
        pair, ((steps, *_), (found_steps, *_)) = served
        compared = 0
        for step, wide in zip(steps, found_steps, strict=True):
            assert step.gates.keys() == wide.gates.keys() and step.sparse == wide.sparse
            for key, gate in step.gates.items():
                if gate is not None:
                    assert torch.equal(wide.gates[key][0], gate[0][:, pair.sources(*key)])
                    compared += 1
        assert compared == (self.NEW_TOKENS - 1) * 2 * 3

    def test_same_densities_and_recall(self, served):
        """Of selections, of the batch's unions, of survivors of fc1; head recall needs the scaled
        thresholds.
        """
        _, ((_, expected, _), (_, found, _)) = served
        assert found["steps"] == expected["steps"] and found["steps"]["sparse"] == self.NEW_TOKENS - 1
        compared = 0
        for gates, wide in zip(expected["layers"], found["layers"], strict=True):
            for block in BLOCKS:
                assert gates[block]["gated"] and wide[block]["gated"]
                for name in ("rows", "density", "read_density", "recall") + (
                    ("survived_density",) if block == "mlp" else ()
                ):
                    assert wide[block][name] == pytest.approx(gates[block][name], abs=1e-12), (block, name)
                    compared += 0 < gates[block][name] < 1
        assert compared > 15, "most shares are 0 or 1: the test says nothing"
