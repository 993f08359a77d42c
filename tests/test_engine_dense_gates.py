"""Blocks that an artifact or the crossover keeps dense are reported as dense, not hidden behind sparse
steps.
"""

from dataclasses import replace

import pytest
from engine import engine, metrics_of, random_prompt, run_requests

from vllm_dejavu.gate import _largest_batch, _of_size
from vllm_dejavu.kernels import cpu, gpu, reference
from vllm_dejavu.kernels.interface import implementation
from vllm_dejavu.manifest import GateSpec

ARRIVALS = {0: {name: random_prompt(5 + i) for i, name in enumerate("abc")}}


def served(model, artifact, **dejavu):
    with engine(model, dejavu={"predictor": artifact, **dejavu}) as llm:
        run_requests(llm, ARRIVALS, 6)
        return metrics_of(llm)


def test_an_artifact_that_gates_nothing_has_no_sparse_steps(opt, predictors):
    """The predicate alone would call every decode step sparse."""
    model = opt()
    counted = served(model, predictors(model, mlp=None, attention=None))
    assert counted["steps"]["sparse"] == 0 and counted["steps"]["mode_dense"] > 0
    assert counted["sparse_step_share"] == 0 and counted["mlp_density"] == counted["head_density"] == 1


def test_batches_beyond_the_calibrated_sizes_are_above_the_crossover(opt, predictors):
    """A union only grows with the batch, so a batch of 3 may not run sparse on the word of a table that ends
    at 2.
    """
    model = opt()
    table = {str(batch): {"mean": 0.1, "upper": 0.1} for batch in (1, 2)}
    artifact = predictors(model, union_density=table)
    assert served(model, artifact, crossover=1.0)["mlp_density"] < 0.9
    assert served(model, artifact, crossover=0.5)["mlp_density"] == 1


UNION = {1: 0.1, 2: 0.2, 8: 0.5, 64: 0.9}
PLAIN = GateSpec(
    state="sparse", form="low_rank", lookahead="self", rank=4, density={"mean": 0.1, "upper": 0.1}
)
CALIBRATED = replace(PLAIN, union_density={str(b): {"mean": d, "upper": d} for b, d in UNION.items()})


@pytest.mark.parametrize(
    ("crossover", "measured", "expected"),
    [
        pytest.param(1.0, {1: 0.01}, None, id="never"),
        pytest.param(0.5, {}, 8, id="given"),
        pytest.param(0.45, {}, 6, id="given-between-calibrated-sizes"),
        pytest.param(0.95, {}, 64, id="given-and-beyond-the-table"),
        pytest.param(0.05, {}, 0, id="given-always"),
        pytest.param(None, {}, None, id="nothing-measured"),
        pytest.param(None, {4: 0.4}, 5, id="measured-for-a-smaller-batch"),
        pytest.param(None, {1: 0.3, 8: 0.6, 32: 0.8}, 3, id="measured"),
        pytest.param(None, {1: 0.6, 32: 0.8}, 13, id="measured-between-calibrated-sizes"),
        pytest.param(None, {100: 0.1}, None, id="measured-for-larger-batches-only"),
    ],
)
def test_the_crossover_is_given_or_as_measured_for_the_kernels(crossover, measured, expected):
    """The largest batch that runs sparse, by the calibrated unions 0.1, 0.2, 0.5, 0.9 of batches 1, 2, 8 and
    64.
    """
    assert _largest_batch(CALIBRATED, crossover, measured) == expected


@pytest.mark.parametrize(
    ("crossover", "measured", "cap", "expected"),
    [
        pytest.param(None, {}, 64, 64, id="nothing-measured"),
        pytest.param(None, {1: 0.3}, 64, 3, id="the-crossover-comes-first"),
        pytest.param(None, {1: 0.95}, 16, 16, id="below-the-calibrated-sizes"),
        pytest.param(1.0, {}, 64, None, id="never-dense-is-asked-for"),
        pytest.param(0.95, {}, 16, 64, id="a-crossover-is-given"),
    ],
)
def test_no_more_tokens_than_the_kernels_are_made_for(crossover, measured, cap, expected):
    """A table {65: 0} would not do: only sizes up to the last calibrated one are looked up in it."""
    assert _largest_batch(CALIBRATED, crossover, measured, cap) == expected


def test_the_cap_needs_no_calibrated_unions():
    assert _largest_batch(PLAIN, None, {}, 64) == 64
    assert tuple(module.KERNELS.largest_batch for module in (reference, cpu, gpu)) == (None, None, 64)


def test_batches_of_64_are_sparse_and_of_65_dense(opt, predictors, monkeypatch):
    """Bug: on a GPU, where nothing is measured, any batch ran sparse; above 64 rows weights are read twice.

    Bug: a step in which every block ran dense was counted as a sparse one.
    """
    monkeypatch.setattr(implementation("cpu"), "largest_batch", 64)
    monkeypatch.setattr(implementation("cpu"), "crossovers", {})
    model = opt()
    with engine(model, dejavu={"predictor": predictors(model)}, max_num_seqs=65) as llm:
        for number, counted_as in ((64, "sparse"), (65, "above_crossover")):
            run_requests(llm, {0: {str(i): random_prompt(3, seed=i) for i in range(number)}}, 4)
            counted = metrics_of(llm, reset=True)
            steps = {reason: number for reason, number in counted["steps"].items() if number}
            assert steps == {"prefill_or_mixed": 1, counted_as: 3}
            assert counted["sparse_step_share"] == (0.75 if number == 64 else 0)
            for layer in counted["layers"]:
                for block in ("mlp", "attention"):
                    counts, dense = layer[block], number > 64
                    assert (counts["rows"], counts["above_crossover"]) == (3 * number, 3 * dense)
                    assert (counts["density"] == counts["read_density"] == 1) == dense, block


def test_without_calibrated_unions_nothing_is_above_a_crossover():
    assert _largest_batch(PLAIN, 0.01, {}) is None


@pytest.mark.parametrize(
    ("hidden", "expected"), [(64, 768), (768, 768), (1024, 768), (2048, 2048), (12288, 2048)]
)
def test_crossovers_are_those_of_the_next_smaller_hidden_size_measured(hidden, expected):
    measured = {2048: {1: 0.9}, 768: {1: 0.8}}
    assert _of_size(measured, hidden) == measured[expected]
    assert _of_size({}, hidden) == {}


@pytest.mark.parametrize("kernels", [reference, cpu, gpu], ids=["reference", "native", "triton"])
def test_measured_crossovers_are_densities_by_block_size_and_batch(kernels):
    """A typing error there would silently make layers dense."""
    for block, sizes in kernels.KERNELS.crossovers.items():
        assert block in ("mlp", "attention") and all(isinstance(hidden, int) for hidden in sizes)
        for table in sizes.values():
            assert list(table) == sorted(table)
            assert all(isinstance(tokens, int) and 0 < density <= 1 for tokens, density in table.items())


def test_a_gate_takes_the_crossovers_of_its_block_and_hidden_size(opt, predictors, monkeypatch):
    """The tiny model's 64 columns are below every size of the table, so that the smallest one counts."""
    model = opt()
    artifact = predictors(
        model, union_density={str(batch): {"mean": d, "upper": d} for batch, d in UNION.items()}
    )
    monkeypatch.setattr(
        implementation("cpu"),
        "crossovers",
        {"mlp": {768: {2: 0.15}, 2048: {}}, "attention": {2048: {8: 0.4}}},
    )
    with engine(model, dejavu={"predictor": artifact}) as llm:
        gates = llm.apply_model(lambda model: [(gate.block, gate.max_tokens) for gate in model.gates])[0]
    assert set(gates) == {("mlp", 1), ("attention", 7)}
