"""vLLM's other features beside the sparse path (docs/compatibility.md): with everything selected they do what
they do on vLLM's own OPT.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from engine import engine, generate, greedy, metrics_of, random_prompt
from vllm.sampling_params import BeamSearchParams, SamplingParams, StructuredOutputsParams

MODEL = Path(__file__).resolve().parent.parent / "examples" / "opt-books-7m"
PROMPTS = [random_prompt(n) for n in (9, 5, 14)]


@pytest.fixture(scope="module")
def both(opt, predictors):
    """run(function of an engine, **options of it) -> (vLLM's own OPT's result, ours with everything selected,
    ours in earnest, its metrics).
    """

    def run(function, **options):
        model, out = opt(), []
        with engine(model, impl="vllm", **options) as llm:
            out.append(function(llm))
        for selection in ({"select_all": True}, {"density": 0.5}):
            with engine(model, dejavu={"predictor": predictors(model, **selection)}, **options) as llm:
                out.append(function(llm))
                counted = metrics_of(llm)
        return *out, counted

    return run


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"async_scheduling": True}, id="async-scheduling"),
        pytest.param({"async_scheduling": False}, id="no-async-scheduling"),
        pytest.param(
            {"enable_chunked_prefill": True, "max_num_batched_tokens": 32, "enable_prefix_caching": True},
            id="chunked-and-cached",
        ),
    ],
)
def test_schedulers(both, options):
    vllm, everything, sparse, counted = both(lambda llm: generate(llm, PROMPTS, 24), **options)
    assert everything == vllm and sparse != vllm
    assert counted["sparse_step_share"] > 0.8


# prompts that n-gram speculation finds something in
REPEATING = [
    [2, *[17, 101, 5, 77] * 5],
    [2, *[30, 31] * 8],
]


def speculated(model, dejavu):
    """Tokens, and the counts of steps."""
    speculative = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 2,
        "prompt_lookup_min": 1,
    }
    with engine(model, dejavu=dejavu, speculative_config=speculative) as llm:
        return generate(llm, REPEATING, 24), metrics_of(llm)["steps"]


@pytest.mark.on_demand
def test_speculative_decoding_verifies_densely(opt, predictors):
    """A verified step adds several tokens a request, so it runs dense: vLLM's own tokens, with which
    speculation has nothing to do.

    In a process of its own: the n-gram proposer imports numba, after which vLLM 0.32 starts no other engine
    in a process.
    """
    model = opt()
    with engine(model, impl="vllm") as llm:
        vllm = generate(llm, REPEATING, 24)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        everything, steps = pool.submit(
            speculated, model, {"predictor": predictors(model, select_all=True)}
        ).result()
    assert everything == vllm
    assert steps["prefill_or_mixed"] > 2, "steps that verify are dense"


def test_log_probabilities(both):
    def scores(llm):
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in PROMPTS],
            greedy(12, logprobs=3, prompt_logprobs=2),
            use_tqdm=False,
        )
        pairs = [
            (token, logprob.logprob)
            for o in outputs
            for places in (o.prompt_logprobs[1:], o.outputs[0].logprobs)
            for place in places
            for token, logprob in place.items()
        ]
        return [token for token, _ in pairs], pytest.approx([value for _, value in pairs], abs=1e-4)

    vllm, everything, sparse, _ = both(scores)
    assert everything[0] == vllm[0] and [*everything[1].expected] == vllm[1]
    assert sparse[0] != vllm[0]


def test_beam_search():
    found = []
    for impl, dejavu in (("vllm", None), ("dejavu", {})):
        with engine(MODEL, impl=impl, dejavu=dejavu, skip_tokenizer_init=False, max_num_seqs=16) as llm:
            outputs = llm.beam_search(
                [{"prompt_token_ids": [2, 17, 101, 5]}] * 2,
                BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True),
            )
            found.append([sequence.tokens for output in outputs for sequence in output.sequences])
            steps = metrics_of(llm)["steps"] if dejavu is not None else None
    assert found[0] == found[1] and len(found[0]) == 6
    assert steps["sparse"] == 0, "vLLM 0.32 sends each step of a beam as a prompt, which runs dense"


def test_sampling_is_seeded(both):
    params = SamplingParams(
        temperature=2.0, seed=7, max_tokens=24, ignore_eos=True, detokenize=False, n=2, logit_bias={17: 2.0}
    )

    def sampled(llm):
        return [
            list(c.token_ids)
            for o in llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
            for c in o.outputs
        ]

    vllm, everything, _, _ = both(sampled, max_num_seqs=8)
    assert everything == vllm and vllm[0] != vllm[1]


def test_structured_output():
    choices = ["the sea", "the house", "a ship"]
    params = SamplingParams(
        temperature=0, max_tokens=12, structured_outputs=StructuredOutputsParams(choice=choices)
    )
    with engine(MODEL, dejavu={}, skip_tokenizer_init=False) as llm:
        text = llm.generate(["They walked towards"], params, use_tqdm=False)[0].outputs[0].text
        assert text in choices and metrics_of(llm)["steps"]["sparse"] > 0


def test_no_pooling(opt, predictors):
    """A pooling model only reads prompts, which run dense; vLLM would convert the class."""
    model = opt()
    with (
        pytest.raises(ValueError, match="runner='pooling'.*only prompts"),
        engine(model, dejavu={"predictor": predictors(model)}, runner="pooling", convert="embed"),
    ):
        pass
