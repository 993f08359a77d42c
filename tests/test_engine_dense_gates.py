"""Blocks that an artifact or the crossover keeps dense are reported as dense, not hidden behind sparse steps."""
from engine import engine, metrics_of, random_prompt, run_requests

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
    """A union only grows with the batch, so a batch of 3 may not run sparse on the word of a table that ends at 2."""
    model = opt()
    table = {str(batch): {"mean": 0.1, "upper": 0.1} for batch in (1, 2)}
    artifact = predictors(model, union_density=table)
    assert served(model, artifact)["mlp_density"] < 0.9
    assert served(model, artifact, crossover=0.5)["mlp_density"] == 1
