"""`vllm-dejavu evaluate` against independent Hugging Face runs of the same text, on the shipped model and
artifact.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from engine import one_collection

from vllm_dejavu import artifact, cli
from vllm_dejavu.predictor_training import data, evaluate
from vllm_dejavu.predictor_training.evaluate import PROMPT_TOKENS, EvaluateConfig, _prompts, increase
from vllm_dejavu.predictor_training.gates import gates_of
from vllm_dejavu.predictor_training.hf_model import HfModel
from vllm_dejavu.predictor_training.masked import Masked
from vllm_dejavu.quantization import quantize_model

MODEL = str(Path(__file__).parent.parent / "examples" / "opt-books-7m")
KEYS = (
    "dense_ppl",
    "sparse_ppl",
    "ppl_increase",
    "mlp_density",
    "head_density",
    "mlp_density_per_layer",
    "head_density_per_layer",
    "oracle_mlp_density",
    "mlp_recall",
    "head_recall",
    "bytes_density",
    "sparse_step_share",
    "agreement_mean_tokens",
    "teacher_forced_top1_agreement",
    "weight_bits",
    "unquantized_dense_ppl",
    "quantization_ppl_increase",
    "total_ppl_increase",
)
PROSE = (
    "It was a cold evening in November when the coach set down its only passenger before the inn. The"
    " landlord, who had been standing at the door with his hands in his pockets, took the lantern from its"
    ' nail and went out into the rain. "You are late, sir," said he; "we had given you up." The traveller'
    " made no answer, but followed him into the parlour, where a great fire was burning, and sat down without"
    " taking off his cloak. His wife said that he had a look of her poor brother, who was drowned at sea in"
    " the year of the great storm, and that she would not sleep that night. "
)


def run(config, *args):
    with one_collection():
        return evaluate.run(config, *args)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("\n\n".join(PROSE * n for n in (3, 4, 5)), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def sparse(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "sparse.json"
    config = EvaluateConfig(model=MODEL, data=(text,), dtype="float32", prompts=3, new_tokens=12)
    return run(config, str(out)), out


def hf_ppl(text, gates, weight_bits=16):
    opt = HfModel(MODEL)
    quantize_model(opt.model, weight_bits)
    tokens = data.tokenize(list(data.read_documents(text)), opt.tokenizer())
    windows = data.pack(tokens, opt.geometry.max_positions - 1, opt.bos, max_tokens=None, seed=None)
    masked = Masked(opt, gates, measure=True)
    return math.exp(masked.nll(windows.tokens, 2)), masked


def test_result_has_every_promised_key_and_is_written(sparse):
    result, out = sparse
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    for key in KEYS:
        assert result[key] is not None, key
    assert len(result["mlp_density_per_layer"]) == len(result["head_density_per_layer"]) == 6
    assert result["artifact"]["fingerprint_verified"]
    assert (
        result["steps"]["sparse"] > 0 and 0 < result["mlp_density"] < 0.5 and 0 < result["bytes_density"] < 1
    )


def test_dense_perplexity_is_hugging_faces(sparse, text):
    assert sparse[0]["dense_ppl"] == pytest.approx(hf_ppl(text, {})[0], rel=2e-4)


def test_sparse_perplexity_density_and_recall_are_those_of_a_masked_hugging_face_model(sparse, text):
    """What calibration measured with masks is what the engine serves: one definition of input, score and
    selection.
    """
    result, loaded = sparse[0], artifact.load(Path(MODEL) / "dejavu")
    gates = gates_of(loaded)
    ppl, masked = hf_ppl(text, gates)
    assert result["sparse_ppl"] == pytest.approx(ppl, rel=5e-4)
    assert abs(result["sparse_ppl"] / result["dense_ppl"] - 1) > 1e-4, (
        "the sparse path must have had an effect"
    )
    for (layer, block), counts in masked.counts.items():
        units = 1024 if block == "mlp" else 4
        density = sum(int(c.sum()) for c in counts) / (masked.tokens * units)
        name = "mlp_density_per_layer" if block == "mlp" else "head_density_per_layer"
        assert result[name][layer] == pytest.approx(density, abs=2e-3), (layer, block)
    recall = sum(masked.hit[k] for k in gates if k[1] == "mlp") / sum(
        masked.active[k] for k in gates if k[1] == "mlp"
    )
    assert result["mlp_recall"] == pytest.approx(recall, abs=5e-3)


def test_without_quantization_its_price_is_nothing(sparse):
    result = sparse[0]
    assert result["weight_bits"] == 16 and result["quantization_ppl_increase"] == 0
    assert (
        result["unquantized_dense_ppl"] == result["dense_ppl"]
        and result["total_ppl_increase"] == result["ppl_increase"]
    )


def test_quantization_dense_and_sparse(text, sparse):
    """Dense in 4 bits is Hugging Face's with these weights, but for the head; both prices make the total."""
    result = run(
        EvaluateConfig(model=MODEL, data=(text,), dtype="float32", prompts=2, new_tokens=8, weight_bits=4)
    )
    assert result["artifact"]["fingerprint_verified"], "predictors stay those of the 16-bit weights"
    assert result["unquantized_dense_ppl"] == pytest.approx(sparse[0]["dense_ppl"], rel=1e-6)
    assert result["dense_ppl"] == pytest.approx(hf_ppl(text, {}, 4)[0], rel=1e-3)
    assert abs(result["dense_ppl"] / result["unquantized_dense_ppl"] - 1) > 1e-3, "4 bits must show"
    rounding = 2e-6  # of float32 means of some 5 nats
    assert result["quantization_ppl_increase"] == pytest.approx(
        result["dense_ppl"] / result["unquantized_dense_ppl"] - 1, abs=rounding
    )
    assert 1 + result["total_ppl_increase"] == pytest.approx(
        (1 + result["ppl_increase"]) * (1 + result["quantization_ppl_increase"]), abs=rounding
    )
    assert result["weight_bits"] == 4 and result["sparse_ppl"] != sparse[0]["sparse_ppl"]


def test_prompts_begin_with_bos_at_evenly_spaced_places():
    """Rows of BOS and text; the prompts are cut out of the text as if it were one."""
    bos, body = 2, torch.arange(100, 100 + 10 * 99).view(10, 99)
    tokens = torch.cat([torch.full((10, 1), bos), body], 1)
    prompts = _prompts(tokens, EvaluateConfig(model=MODEL, data=("text",), prompts=3, new_tokens=8), 100)
    length = min(PROMPT_TOKENS, 92)
    assert [p[0] for p in prompts] == [bos] * 3 and [len(p) for p in prompts] == [length] * 3
    assert [p[1] for p in prompts] == [100, 100 + (990 - length) // 2, 100 + 990 - length]
    assert all(p[1:] == list(range(p[1], p[1] + length - 1)) for p in prompts)


def test_increase_and_its_error_by_hand():
    """Windows of mean rise 0.1 and 0.3: e^0.2 - 1; their standard deviation 0.1414 over sqrt(2), times
    e^0.2.
    """
    nll = torch.tensor([[1.0, 1.2], [2.5, 2.1]])
    found = increase("x", nll, torch.ones(2, 2) * torch.tensor([[1.0], [2.0]]))
    assert found == {"x": pytest.approx(math.expm1(0.2)), "x_stderr": pytest.approx(0.1 * math.exp(0.2))}
    assert increase("x", nll[:1], nll[:1]) == {"x": 0.0, "x_stderr": None}


def test_mode_dense_is_its_own_baseline(text):
    result = run(
        EvaluateConfig(
            model=MODEL, data=(text,), mode="dense", dtype="float32", prompts=2, new_tokens=8, max_tokens=1100
        )
    )
    assert result["ppl_increase"] == pytest.approx(0, abs=1e-6)
    assert result["agreement_mean_tokens"] == 8 and result["teacher_forced_top1_agreement"] == 1
    assert result["mlp_density"] == result["head_density"] == result["bytes_density"] == 1
    assert result["sparse_step_share"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing.txt"], "No such file"),
        (["--data", __file__], ".txt or .jsonl"),
        (["--data", "missing.txt", "--json", "/no/such/dir/out.json"], "not a writable directory"),
        (["--data", "missing.txt", "--max-tokens", "1"], "--max-tokens"),
    ],
    ids=["missing-data", "not-text", "unwritable-json", "too-few-tokens"],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert cli.main(["evaluate", "--model", MODEL, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
