"""Peak memory while a 16-bit checkpoint is loaded, in 16 and in 8 bits. A measurement.

    python benchmarks/studies/loading_memory.py --model DIR --output OUT
    python benchmarks/studies/loading_memory.py --geometry 1.3b --tokenizer DIR --output OUT

Anonymous memory of an engine's process (what a checkpoint's file maps is the page cache's), looked at every
10 ms, beyond what it held before the engine was made; beside the bytes of the model's parameters and of its
largest tensor in the checkpoint. Mode `dense`: no artifact is needed. With --geometry the checkpoint is
random and is written first.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

sys.path += [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]
from common import Table, print_rows, read_rows  # noqa: E402

from vllm_dejavu.published import GEOMETRIES  # noqa: E402

CACHE_BYTES = 256 << 20  # of the KV cache: counted too


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


class Peak(threading.Thread):
    """The most anonymous memory while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.done = 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.01):
            self.bytes = max(self.bytes, anonymous_bytes())


def measure(model: Path, bits: int, table: Table, name: str) -> None:
    from safetensors import safe_open
    from vllm import LLM

    largest = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                shape = tensors.get_slice(key).get_shape()
                largest = max(largest, 2 * shape[0] * (shape[1] if len(shape) > 1 else 1))
    before, peak = anonymous_bytes(), Peak()
    peak.start()
    llm = LLM(
        str(model),
        model_impl="dejavu",
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=1,
        max_num_batched_tokens=256,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        kv_cache_memory_bytes=CACHE_BYTES,
        additional_config={"dejavu": {"mode": "dense", "weight_bits": bits}},
    )
    peak.done.set()
    peak.join()
    size = llm.apply_model(lambda m: sum(p.nbytes for p in {id(p): p for p in m.parameters()}.values()))[0]
    table.add(
        benchmark="loading memory",
        model=name,
        weight_bits=bits,
        parameters_mb=size / 1e6,
        largest_tensor_mb=largest / 1e6,
        cache_mb=CACHE_BYTES / 1e6,
        peak_mb=(peak.bytes - before) / 1e6,
        held_mb=(anonymous_bytes() - before) / 1e6,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory while loading.")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--geometry", choices=GEOMETRIES)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", choices=[8, 16], default=[16, 8])
    parser.add_argument("--name")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    name = args.name or args.geometry or args.model.name
    table = Table(args.output / f"loading-memory-{name}.csv")
    if args.model and len(args.bits) == 1:
        table.rows += read_rows(table.path.name, args.output)
        return measure(args.model, args.bits[0], table, name)
    with tempfile.TemporaryDirectory() as work:
        if args.geometry:
            from peer_ctranslate2 import write_checkpoint

            args.model = Path(work) / args.geometry
            write_checkpoint(args.geometry, args.tokenizer, args.model)
        table.path.unlink(missing_ok=True)
        for bits in args.bits:  # a process each
            command = [sys.executable, __file__, "--model", str(args.model), "--bits", str(bits)]
            command += ["--name", name, "--output", str(args.output)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = read_rows(table.path.name, args.output)
    print_rows(rows, ("weight_bits", "parameters_mb", "largest_tensor_mb", "cache_mb", "peak_mb", "held_mb"))


if __name__ == "__main__":
    main()
