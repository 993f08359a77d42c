"""`vllm-dejavu`: train, evaluate, adopt, inspect, tune, plan, probe, doctor. Thin: arguments in, one
function called, result printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence

from vllm_dejavu import __version__, plan_table
from vllm_dejavu.config import BLOCKS, EVALUATED_MODES, LOOKAHEADS, WEIGHT_BITS


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 refused or failed with a message, 130 interrupted."""
    args = _parser().parse_args(argv)
    args.typed = sys.argv[1:] if argv is None else argv
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as e:
        print(f"vllm-dejavu {args.command}: {e}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-dejavu", description="Contextual sparsity for vLLM.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("train", help="text -> predictor artifact, in one resumable run")
    p.add_argument("--model", required=True, help="directory or hub id of an OPT")
    p.add_argument(
        "--data",
        required=True,
        nargs="+",
        help=".txt/.jsonl files (also .xz, .gz), dataset ids, or 'self': the model writes its own text",
    )
    p.add_argument(
        "--valid-data",
        nargs="+",
        default=[],
        help="held-out text for calibration (default: documents held out from --data)",
    )
    p.add_argument(
        "--output", required=True, help="directory of the artifact; MODEL/dejavu is found without a setting"
    )
    p.add_argument("--field", default="text", help="key of the text in JSON lines and dataset rows")
    p.add_argument("--valid-share", type=float, default=0.1, help="share of the documents held out")
    p.add_argument("--max-documents", type=int, help="read at most so many documents of each source")
    p.add_argument(
        "--max-tokens",
        type=int,
        help="training tokens (default: the paper's 500 sequences of the model's context, at most 2048 each)",
    )
    p.add_argument("--valid-tokens", type=int, default=32_768, help="calibration tokens")
    p.add_argument(
        "--seq-len", type=int, help="tokens a window (default: the model's positions, at most 2048)"
    )
    p.add_argument(
        "--rank",
        type=int,
        help=(
            "of the MLP predictors (default: 3%% of the MLP's bytes; hidden sizes below 2048: a quarter of"
            " them)"
        ),
    )
    p.add_argument(
        "--form",
        default="finetuned",
        help=(
            "of the MLP predictors: closed_form, finetuned (from there, by gradient), paper, svd, or"
            " module:attribute of your own"
        ),
    )
    p.add_argument(
        "--gradient-tokens", type=int, default=32_768, help="at most, that forms which train by gradient see"
    )
    p.add_argument("--head-form", choices=("closed_form", "paper"), default="closed_form")
    p.add_argument(
        "--head-share", type=float, default=0.3, help="share of heads that the paper's rule labels important"
    )
    p.add_argument(
        "--loss",
        choices=("bce", "energy"),
        default="energy",
        help="energy: a missed neuron weighs what it would have added; bce: they all weigh the same",
    )
    p.add_argument(
        "--neuron-label",
        choices=("positive", "energy"),
        default="positive",
        help="active neurons: all positive ones, or the fewest that hold --energy-share",
    )
    p.add_argument("--energy-share", type=float, default=0.99)
    p.add_argument(
        "--head-label",
        choices=("contribution", "output_norm"),
        default="contribution",
        help="norm after out_proj, or before it (the paper's)",
    )
    p.add_argument("--mlp-lookahead", choices=LOOKAHEADS["mlp"], default="self")
    p.add_argument("--head-lookahead", choices=LOOKAHEADS["attention"], default="previous")
    p.add_argument(
        "--dtype",
        choices=("int8", "float16", "bfloat16", "float32"),
        default="int8",
        help="of the predictors",
    )
    p.add_argument(
        "--max-ppl-increase",
        type=float,
        default=0.01,
        help="perplexity budget of the calibration, 0.01 for 1%%",
    )
    p.add_argument(
        "--max-memory", type=_size, help="of the moments, as 64G: with less, more passes over the text"
    )
    p.add_argument(
        "--max-disk",
        type=_size,
        help="of stored activations (gradient forms), as 200G: with less, fewer of the tokens",
    )
    p.add_argument("--batch", type=int, default=4, help="windows a forward pass")
    p.add_argument(
        "--device",
        default="cpu",
        help="cpu, cuda, ..., or auto: spread a large model over devices, memory and disk",
    )
    p.add_argument(
        "--model-dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="that the model computes in",
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--ray",
        metavar="ADDRESS|auto",
        help="share collection and fitting among the workers of a Ray cluster",
    )
    p.add_argument("--ray-workers", type=int, help="model replicas on the cluster (default: one a node)")
    p.add_argument("--run-dir", help="state, metrics.jsonl and plots (default: OUTPUT.run)")
    p.add_argument("--overwrite", action="store_true", help="replace an artifact at --output")
    p.add_argument(
        "--resume",
        action="store_true",
        help=(
            "continue an interrupted run, or refuse (without it: continue one of the same settings, else"
            " begin)"
        ),
    )
    p.add_argument("--restart", action="store_true", help="forget an interrupted run")
    p.set_defaults(run=_train)

    p = commands.add_parser(
        "evaluate", help="perplexity, density, recall and agreement of the serving model against dense"
    )
    p.add_argument("--model", required=True)
    p.add_argument("--predictor", help="directory or hub id of the artifact (default: MODEL/dejavu)")
    p.add_argument("--data", required=True, nargs="+")
    p.add_argument("--field", default="text")
    p.add_argument("--mode", choices=EVALUATED_MODES, default="sparse")
    p.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    p.add_argument(
        "--max-tokens", type=int, help="score at most so many tokens (and compare fewer continuations)"
    )
    p.add_argument("--prompts", type=int, default=200, help="greedy continuations compared with dense")
    p.add_argument("--new-tokens", type=int, default=64)
    p.add_argument("--dtype", default="auto")
    p.add_argument(
        "--weight-bits",
        type=int,
        choices=WEIGHT_BITS,
        default=16,
        help="8 or 4: with weights rounded to so many bits, dense and sparse (one more engine; CPU)",
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", help="write the result here")
    p.set_defaults(run=_evaluate)

    p = commands.add_parser(
        "adopt",
        help="take an artifact over for a checkpoint with nearly the same weights, such as a quantized one",
    )
    p.add_argument("artifact", help="directory of the artifact")
    p.add_argument("--model", required=True, help="directory or hub id of the other checkpoint")
    p.add_argument("--data", required=True, nargs="+", help="text that neither was made with")
    p.add_argument("--output", required=True, help="directory of the copy")
    p.add_argument("--field", default="text")
    p.add_argument("--max-tokens", type=int, default=32_768, help="of the text (%(default)s)")
    p.add_argument(
        "--max-ppl-increase",
        type=float,
        default=0.01,
        help="sparse over dense with its weights; beyond it nothing is written (%(default)s)",
    )
    p.add_argument("--dtype", default="auto")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(run=_adopt)

    p = commands.add_parser("inspect", help="an artifact as a readable table")
    p.add_argument("artifact")
    p.set_defaults(run=_inspect)

    p = commands.add_parser(
        "tune",
        help="measure where dense is faster than sparse on this device, and keep it beside the artifact",
    )
    p.add_argument("artifact", help="directory of the artifact")
    p.add_argument("--device", default="auto", help="cpu, cuda, or auto (%(default)s)")
    p.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of the model's weights as served (%(default)s)",
    )
    p.add_argument("--tp", type=int, default=1, help="tensor-parallel size (%(default)s)")
    p.add_argument(
        "--weight-bits", type=int, choices=[16, 8], default=16, help="of the layers' weights (%(default)s)"
    )
    p.add_argument(
        "--threads",
        type=int,
        help="that compute on a CPU, as many as the server's worker has (default: all cores)",
    )
    p.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="batch sizes")
    p.add_argument(
        "--rounds", type=int, default=15, help="measurements of each; their median counts (%(default)s)"
    )
    p.set_defaults(run=_tune)

    p = commands.add_parser("plan", help="will sparsity pay? modelled gain and memory cost; nothing measured")
    p.add_argument("model", nargs="?", help="directory or hub id of an OPT, or a size such as 6.7b")
    p.add_argument("--gpu", help="a100, h100, h200, b200 or mi300x")
    p.add_argument("--batch", type=plan_table.numbers, help="requests decoding together (1)")
    p.add_argument("--context", type=plan_table.numbers, help="tokens each attends to (256)")
    p.add_argument(
        "--predictor",
        help="directory or hub id of the artifact (default: MODEL/dejavu, else assumed densities)",
    )
    p.add_argument("--tp", type=int, default=1, help="tensor-parallel size (%(default)s)")
    p.add_argument("--json", action="store_true", help="the same as JSON")
    plan_table.add_options(p)
    p.set_defaults(run=_plan)

    p = commands.add_parser(
        "probe", help="how sparse is a model by itself? measured in Transformers, without training"
    )
    p.add_argument("model", help="directory or hub id of a model with ReLU or its square, served or not")
    p.add_argument("--data", nargs="+", default=[], help="text, as of train (default: the model's own)")
    p.add_argument("--field", default="text")
    p.add_argument("--tokens", type=int, default=8_192, help="of the text (%(default)s)")
    p.add_argument("--seq-len", type=int, default=512, help="tokens a window (%(default)s)")
    p.add_argument("--device", default="cpu")
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(%(default)s)"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--gpu", help="also model times on an a100, h100, h200, b200 or mi300x")
    p.add_argument("--output", help="directory for probe.json, probe.md and probe.png")
    p.set_defaults(run=_probe)

    p = commands.add_parser("doctor", help="would --model-impl dejavu take effect here?")
    p.set_defaults(run=_doctor)
    return parser


def _size(text: str) -> int:
    """Bytes: 500M, 64G, 2T or a plain number."""
    unit = text[-1:].upper()
    power = "KMGT".find(unit) + 1 if unit else 0
    try:
        return int(float(text[:-1] if power else text) * 1000**power)
    except (ValueError, OverflowError) as e:
        raise argparse.ArgumentTypeError(f"expected a size as 64G, found {text!r}") from e


def _fields(cls: type, args: argparse.Namespace) -> dict:
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(cls)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _train(args: argparse.Namespace) -> int:
    # Read when torch loads OpenMP. Threads that wait at barriers by spinning take the cores from each other
    # as soon as anything else runs on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from vllm_dejavu.inspection import artifact_table
    from vllm_dejavu.predictor_training import pipeline

    config = pipeline.TrainConfig(**_fields(pipeline.TrainConfig, args))
    artifact = pipeline.run(
        config,
        overwrite=args.overwrite,
        restart=args.restart,
        resume=args.resume,
        run_dir=args.run_dir,
        ray=args.ray,
        ray_workers=args.ray_workers,
    )
    print(artifact_table(artifact))
    print(f"wrote {args.output}; metrics and plots: {args.run_dir or args.output.rstrip('/') + '.run'}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from vllm_dejavu.predictor_training import evaluate

    config = evaluate.EvaluateConfig(**_fields(evaluate.EvaluateConfig, args))
    result = evaluate.run(config, args.json)
    print(json.dumps({k: v for k, v in result.items() if k not in ("settings", "versions")}, indent=1))
    return 0


def _adopt(args: argparse.Namespace) -> int:
    from vllm_dejavu.inspection import artifact_table
    from vllm_dejavu.predictor_training import adopt

    print(artifact_table(adopt.run(adopt.AdoptConfig(**_fields(adopt.AdoptConfig, args)))))
    print(f"wrote {args.output}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from vllm_dejavu import artifact
    from vllm_dejavu.inspection import artifact_table

    print(artifact_table(artifact.load(args.artifact)))
    return 0


def _tune(args: argparse.Namespace) -> int:
    import torch

    from vllm_dejavu import tune

    if (
        min(args.tokens) < 1
        or args.rounds < 1
        or args.tp < 1
        or (args.threads is not None and args.threads < 1)
    ):
        raise ValueError("--tokens, --rounds, --tp and --threads must be at least 1")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    path = tune.run(
        args.artifact,
        device=device,
        dtype=args.dtype,
        tp=args.tp,
        weight_bits=args.weight_bits,
        tokens=sorted(set(args.tokens)),
        rounds=args.rounds,
        progress=lambda line: print(line, flush=True),
    )
    print(f"written to {path}: engines on this device take it from there")
    return 0


def _plan(args: argparse.Namespace) -> int:
    if args.table:
        if args.json or args.predictor:
            raise ValueError("--json, --predictor: of one model alone, not with --table.")
        plan_table.run(args, args.typed)
        return 0
    plan_table.refuse_without_table(args)
    batch, context = args.batch or [1], args.context or [256]
    if args.model is None or args.gpu is None or len(batch) > 1 or len(context) > 1:
        raise ValueError("name a MODEL, a --gpu, one --batch and one --context, or --table for many of them.")
    from vllm_dejavu import plan

    result = plan.plan(
        args.model, args.gpu, batch=batch[0], context=context[0], predictor=args.predictor, tp=args.tp
    )
    print(json.dumps(result, indent=1) if args.json else plan.report(result))
    return 0


def _probe(args: argparse.Namespace) -> int:
    from pathlib import Path

    from vllm_dejavu.predictor_training import probe

    result = probe.run(probe.ProbeConfig(**_fields(probe.ProbeConfig, args)))
    print(probe.report(result))
    if args.output:
        print("wrote", *probe.save(result, Path(args.output)))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from vllm_dejavu.inspection import diagnose

    report, healthy = diagnose()
    print(report)
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
