"""What `vllm-dejavu train` refuses, and how its settings are read: before any work, in one line."""

import argparse

import pytest
from training_runs import config

from vllm_dejavu import cli
from vllm_dejavu.predictor_training import data, pipeline


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": -1}, "--rank -1"),
        ({"max_ppl_increase": -0.5}, "--max-ppl-increase -0.5"),
        ({"valid_share": 1.5}, "--valid-share 1.5"),
        ({"mlp_lookahead": "next"}, "--mlp-lookahead 'next'"),
        ({"dtype": "int3"}, "--dtype 'int3'"),
        ({"form": "magic"}, "--form 'magic' is unknown"),
        ({"head_form": "svd"}, "--head-form 'svd'"),
        ({"loss": "mse"}, "--loss 'mse'"),
        ({"neuron_label": "large"}, "--neuron-label 'large'"),
        ({"head_label": "x"}, "--head-label 'x'"),
        ({"model_dtype": "int8"}, "--model-dtype 'int8'"),
        ({"energy_share": 0.0}, "--energy-share 0.0"),
        ({"head_share": 2.0}, "--head-share 2.0"),
        ({"max_disk": -1}, "--max-disk -1"),
        # Bug: this was found out after the whole pass over the text.
        ({"form": "svd", "mlp_lookahead": "previous"}, "--form svd is for --mlp-lookahead self only"),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
def test_bad_values_name_the_flag(model, text, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(model, text, tmp_path / "x", **changes)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("rank", 0),
        ("seq_len", 0),
        ("max_documents", 0),
        ("max_memory", 0),
        ("max_disk", 0),
        ("max_tokens", 0),
    ],
)
def test_zero_is_not_taken_for_the_default(model, text, tmp_path, flag, value):
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} 0 is out of range"):
        config(model, text, tmp_path / "x", **{flag: value})


def test_rank_above_the_hidden_size_is_refused(model, text, tmp_path):
    with pytest.raises(ValueError, match="hidden size 64"):
        pipeline.run(config(model, text, tmp_path / "x", rank=4096))
    assert not (tmp_path / "x").exists()


def test_text_shorter_than_one_sequence_is_refused(model, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("One line.\n\nAnother.\n")
    with pytest.raises(data.DataError, match="one sequence"):
        pipeline.run(config(model, str(short), tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_data_errors_leave_no_run_directory(model, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(data.DataError):
        pipeline.run(config(model, str(tmp_path / "empty.txt"), tmp_path / "x"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt"]


def test_cli_reports_errors_in_one_line(model, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert cli.main(["train", "--model", model, "--data", str(empty), "--output", str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err
    assert "empty" in error and "Traceback" not in error
    (tmp_path / "file").write_text("")
    assert (
        cli.main(["train", "--model", model, "--data", str(empty), "--output", str(tmp_path / "file" / "x")])
        == 1
    )
    assert "cannot be written" in capsys.readouterr().err
    assert (
        cli.main(["train", "--model", "/no/such/model", "--data", "self", "--output", str(tmp_path / "x")])
        == 1
    )
    assert "Model /no/such/model: no such directory" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path)]) == 1
    assert "dejavu.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500", 500),
        ("1K", 1000),
        ("500M", 5 * 10**8),
        ("64G", 64 * 10**9),
        ("2t", 2 * 10**12),
        ("1.5G", 15 * 10**8),
        ("1e3", 1000),
    ],
)
def test_sizes(text, size):
    assert cli._size(text) == size


@pytest.mark.parametrize("text", ["", "G", "64GB", "many", "nan", "inf", "6 4G", "1P"])
def test_what_is_no_size(text):
    """Bug: infinity ended in a traceback."""
    with pytest.raises(argparse.ArgumentTypeError, match="expected a size as 64G"):
        cli._size(text)
