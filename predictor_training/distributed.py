"""Collection and fitting on a Ray cluster: `vllm-dejavu train --ray ADDRESS|auto`. Calibration stays with the
driver.

Every node needs this package and Ray installed, in the driver's versions, and the model under the driver's
name for it. A form that stores activations also needs the run directory on a file system that all nodes
share.

The text is cut into chunks; idle workers take the next one, and the driver adds their moments in the order of
the text, in fp64. So the result depends on no worker's speed or death, and differs from one machine's by
rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import logging
import os
import socket
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vllm_dejavu.predictor_training.collect import (
    Collector,
    Moments,
    Request,
    checkpoint_key,
    load_checkpoint,
    save_checkpoint,
)
from vllm_dejavu.predictor_training.config import MODEL_DTYPES, TrainConfig
from vllm_dejavu.predictor_training.hf_model import HfModel
from vllm_dejavu.predictor_training.report import say
from vllm_dejavu.predictor_training.samples import SampleStore
from vllm_dejavu.predictor_training.train import FitSettings, FittedLayer, LayerWeights, fit_layer

try:
    import ray
except ImportError:
    ray = None

# As numpy: Ray shares arrays between processes without copying, and pickles tensors at a tenth of the speed
# (400 MB: 0.26 s, 4.1 s).
Arrays = dict[str, np.ndarray | None]

# Chunks are what workers even out by, and what a death may cost: several for each worker, of so many batches
# at most.
CHUNKS_A_WORKER, CHUNK_BATCHES = 4, 64
# Chunks under way or waiting to be added, for each worker: what bounds the moments held in Ray's object
# store.
CHUNKS_AHEAD = 2
# Of work that a killed driver may cost, and the chunk it waited for.
SAVE_EVERY_S = 60
# Workers that one piece of work may kill. Preemption will not hit the same piece so often; too little memory
# will.
MAX_DEATHS = 8
# Without any worker, until the user is told what is missing.
PATIENCE_S = 60


class OnRay:
    """Collects and fits on the workers of a Ray cluster (`pipeline.Workers`).

    Args:
        model: the driver's own replica. address: of the cluster, or "auto": the one running on this host.
        num_workers: model replicas; None: one for each node that can hold one.

    Raises:
        ValueError: no Ray, no cluster, or none of its nodes can hold a replica.
    """

    def __init__(self, config: TrainConfig, model: HfModel, address: str, num_workers: int | None = None):
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"--ray-workers {num_workers} is out of range: expected at least 1.")
        connect(address)
        on_gpu = config.device.startswith("cuda")
        nodes = [
            n["Resources"]
            for n in ray.nodes()
            if n["Alive"] and n["Resources"].get("GPU" if on_gpu else "CPU", 0) >= 1
        ]
        if not nodes:
            raise ValueError(
                f"--ray {address}: no node of the cluster has a {'GPU' if on_gpu else 'CPU'}. Add one, or"
                " choose another --device."
            )
        self.num_workers = num_workers or len(nodes)
        on_a_node = -(-self.num_workers // len(nodes))
        cpus = max(1, int(min(n.get("CPU", 0) for n in nodes)) // on_a_node)
        gpus = int(min(n.get("GPU", 0) for n in nodes)) // on_a_node
        # A worker on a GPU computes there; "auto" spreads the model over its share of the node, else a worker
        # has its share of the cores.
        self.resources = (
            {"num_cpus": 0, "num_gpus": 1}
            if on_gpu
            else {"num_cpus": cpus, "num_gpus": gpus if config.device == "auto" else 0}
        )
        self.model, self.on_gpu = model, on_gpu
        name = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
        # Ray shows a process only the GPUs it was given: whichever the driver uses, a worker's is the first.
        self.config = dataclasses.replace(config, model=name, device="cuda" if on_gpu else config.device)

    def collect(
        self,
        request: Request,
        tokens: torch.Tensor,
        checkpoint: Path,
        key: dict[str, Any],
        store: SampleStore | None,
        progress: Callable[[int], None] | None = None,
    ) -> Moments:
        """As `Collector.run`; resumes its checkpoints, and it those of this.

        Raises:
            ValueError: a worker finds no model, another one, or not the sample directory. Any other error of
            a worker, as it is. ChildProcessError: a chunk killed MAX_DEATHS workers.
        """
        total_key = checkpoint_key(key, request.layers)
        found, done = load_checkpoint(checkpoint, total_key) or (Moments({}, 0), 0)
        total, num_tokens = {k: v.numpy() for k, v in found.tensors.items()}, found.num_tokens
        if store is not None:
            store.discard_from(done)

        def save() -> None:
            save_checkpoint(checkpoint, total_key, _moments(total, num_tokens), done)

        batches = -(-len(tokens) // self.config.batch)
        size = self.config.batch * min(max(1, batches // (CHUNKS_A_WORKER * self.num_workers)), CHUNK_BATCHES)
        chunks = [range(start, min(start + size, len(tokens))) for start in range(done, len(tokens), size)]
        bar = tqdm(
            total=tokens.numel(),
            initial=num_tokens,
            unit="tok",
            unit_scale=True,
            disable=progress is not None,
            desc=f"collect layers {request.layers.start}-{request.layers.stop - 1}",
        )
        saved = time.monotonic()
        with bar, shared(store) as place, self._workers(min(self.num_workers, len(chunks))) as workers:

            def ask(worker: Any, chunk: range) -> list[Any]:
                # A slice alone would be pickled with the whole text.
                return worker.collect.options(num_returns=2).remote(
                    request, tokens[chunk.start : chunk.stop].clone(), chunk.start, place
                )

            for chunk, (count, arrays) in zip(chunks, in_order(workers, chunks, ask), strict=True):
                for name, value in arrays.items():
                    if name in total:
                        total[name] += value
                    else:
                        total[name] = value.copy()  # Ray's own is read-only
                num_tokens, done = num_tokens + count, chunk.stop
                bar.update(count)
                if progress is not None:
                    progress(count)
                if time.monotonic() - saved > SAVE_EVERY_S:
                    save()
                    saved = time.monotonic()
        save()
        return _moments(total, num_tokens)

    @contextmanager
    def _workers(self, count: int) -> Iterator[list[Any]]:
        """Actors, until the fit wants their cores."""
        # Restarted by Ray, wherever there is room. Their chunks are not: another worker is there sooner.
        made = ray.remote(Worker).options(
            max_restarts=-1, max_task_retries=0, scheduling_strategy="SPREAD", **self.resources
        )
        workers = [
            made.remote(self.config, self.model.spec.fingerprint, max(1, self.resources["num_cpus"]))
            for _ in range(count)
        ]
        try:
            yield workers
        finally:
            for worker in workers:
                ray.kill(worker)

    def fit(
        self, settings: FitSettings, moments: Moments, layers: range, store: SampleStore | None
    ) -> dict[int, FittedLayer]:
        """A task for each layer; they are sent no earlier than a core is free, for what a layer takes in
        memory.
        """
        on_gpu = self.on_gpu and store is not None  # only forms that train by gradient compute there
        settings = dataclasses.replace(settings, device="cuda" if on_gpu else "cpu")
        task = ray.remote(_fit).options(num_cpus=1, num_gpus=int(on_gpu), max_retries=MAX_DEATHS)
        at_once = max(1, int(ray.cluster_resources().get("GPU" if on_gpu else "CPU", 1)))
        running, fitted, coming = {}, {}, iter(layers)
        with shared(store) as place, tqdm(total=len(layers), desc="fit", unit="layer") as bar:
            while len(fitted) < len(layers):
                while len(running) < at_once and (i := next(coming, None)) is not None:
                    own = {k: v.numpy() for k, v in moments.layer(i).items()}
                    weights = {
                        k: None if v is None else v.numpy()
                        for k, v in vars(LayerWeights.of(self.model, i)).items()
                    }
                    running[task.remote(settings, i, own, moments.num_tokens, weights, place)] = i
                [ready], _ = ray.wait(list(running))
                fitted[running.pop(ready)] = result(ready)
                bar.update()
        return {i: fitted[i] for i in layers}


class Worker:
    """A model replica in a process of its own. It loads when first needed: an error then is an answer, not a
    death to recover from.
    """

    def __init__(self, config: TrainConfig, fingerprint: str, threads: int):
        self.config, self.fingerprint = config, fingerprint
        torch.set_num_threads(threads)

    @functools.cached_property
    def model(self) -> HfModel:
        host, name = socket.gethostname(), self.config.model
        if Path(name).is_absolute() and not Path(name).is_dir():
            raise ValueError(
                f"Worker on {host} finds no model {name}. Copy it there, or name one on a file system that"
                " all nodes share."
            )
        self._offload = tempfile.TemporaryDirectory() if self.config.device == "auto" else None
        offload = None if self._offload is None else Path(self._offload.name)
        model = HfModel(name, self.config.device, MODEL_DTYPES[self.config.model_dtype], offload)
        if model.spec.fingerprint != self.fingerprint:
            raise ValueError(
                f"Worker on {host} has other weights under {name} than the driver. Copy the driver's there."
            )
        return model

    def place(self) -> str:
        return f"{socket.gethostname()}, process {os.getpid()}"

    def collect(
        self, request: Request, tokens: torch.Tensor, first_window: int, place: Shared | None
    ) -> tuple[int, Arrays]:
        """Moments of a chunk: their number of tokens, and the sums."""
        store = None if place is None else place.seen()
        collector = Collector(self.model, request, samples=store, first_window=first_window)
        moments = collector.run(tokens, self.config.batch, progress=lambda n: None)
        return moments.num_tokens, {k: v.numpy() for k, v in moments.tensors.items()}


def _fit(
    settings: FitSettings, layer: int, own: Arrays, num_tokens: int, weights: Arrays, place: Shared | None
) -> FittedLayer:
    torch.set_num_threads(1)
    # Copied: what Ray hands out is read-only, which torch does not know about.
    moments = Moments({f"layers.{layer}.{k}": torch.tensor(v) for k, v in own.items()}, num_tokens)
    weights = LayerWeights(**{k: None if v is None else torch.tensor(v) for k, v in weights.items()})
    return fit_layer(settings, moments, layer, weights, None if place is None else place.seen())


def in_order(
    workers: list[Any], chunks: list[range], ask: Callable[[Any, range], list[Any]]
) -> Iterator[tuple[int, Arrays]]:
    """What `Worker.collect` gives for each chunk, in their order. A chunk that died with its worker goes to
    the next idle one.

    Workers that Ray cannot place yet, or again, hold up nothing while there are others.

    Args:
        ask: sends a chunk to a worker.
    """
    idle: list[tuple[Any, str]] = []
    running: dict[Any, tuple[Any, str, int, Any]] = {}
    finished: dict[int, tuple[int, Any]] = {}
    waiting, following, deaths, told = list(range(len(chunks))), 0, Counter(), False

    def start(worker: Any) -> Any:
        return worker.place.options(max_task_retries=-1).remote()

    def lost(index: int, where: str, why: Exception) -> None:
        deaths[index] += 1
        if deaths[index] == MAX_DEATHS:
            raise ChildProcessError(
                f"Windows {chunks[index].start}-{chunks[index].stop - 1} killed {MAX_DEATHS} workers, the"
                f" last on {where} ({type(why).__name__}). Most likely memory: fewer --ray-workers, a smaller"
                " --batch or --max-memory take less."
            ) from why
        say(
            f"warning: windows {chunks[index].start}-{chunks[index].stop - 1} were lost with a worker on"
            f" {where} ({type(why).__name__}); doing them again"
        )
        heapq.heappush(waiting, index)

    starting = {start(worker): worker for worker in workers}
    while following < len(chunks):
        while idle and waiting and waiting[0] < following + CHUNKS_AHEAD * len(workers):
            (worker, where), index = idle.pop(), heapq.heappop(waiting)
            count, arrays = ask(worker, chunks[index])
            running[count] = worker, where, index, arrays
        if following in finished:
            count, arrays = finished.pop(following)
            try:
                part = ray.get(arrays)
            except ray.exceptions.RayError as e:  # its node died since
                lost(following, "a lost node", e)
                continue
            yield count, part
            following += 1
            continue
        ready, _ = ray.wait([*starting, *running], timeout=PATIENCE_S)
        if not ready:
            if not idle and not running and not told:
                told = True
                say(f"waiting for a worker: the cluster has {ray.available_resources()} free")
            continue
        [ready] = ready
        if ready in starting:
            idle.append((starting.pop(ready), result(ready)))
            continue
        worker, where, index, arrays = running.pop(ready)
        try:
            finished[index] = ray.get(ready), arrays
            idle.append((worker, where))
        except ray.exceptions.RayTaskError:
            result(arrays)  # the same error; one never asked for would be printed as unhandled
        except ray.exceptions.RayError as e:
            lost(index, where, e)
            starting[start(worker)] = worker


def connect(address: str) -> None:
    """To a running cluster, unless this process is connected already."""
    if ray is None:
        raise ValueError("--ray needs Ray: pip install 'vllm-dejavu[ray]'.")
    if ray.is_initialized():
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():
            socket.create_connection(
                (host, int(port)), timeout=10
            ).close()  # Ray itself would try for minutes
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ray.exceptions.RayError) as e:
        raise ValueError(
            f"--ray {address}: {e} Start a cluster with `ray start --head`, or name the address of one."
        ) from e


def result(ref: Any) -> Any:
    """Of a task.

    Raises:
        Exception: the task's own. ChildProcessError: its process died again and again.
    """
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as e:
        raise e.cause from e
    except ray.exceptions.RayError as e:
        raise ChildProcessError(
            f"A Ray worker failed: {e}\nEvery node needs vllm-dejavu and Ray installed, in the driver's"
            " versions."
        ) from e


@dataclasses.dataclass(frozen=True)
class Shared:
    """A sample directory with a mark of the driver's in it: a worker must see this directory, not one of the
    same name.
    """

    store: SampleStore
    mark: str

    FILE = ".driver"

    def seen(self) -> SampleStore:
        """The store, if this process sees it."""
        path = self.store.directory / self.FILE
        if not path.is_file() or path.read_text() != self.mark:
            raise ValueError(
                f"Worker on {socket.gethostname()} does not see {self.store.directory}, where activations are"
                " stored. Put --run-dir on a file system that all nodes share, or take --form closed_form"
                " and --head-form closed_form, which store none."
            )
        return self.store


@contextmanager
def shared(store: SampleStore | None) -> Iterator[Shared | None]:
    if store is None:
        yield None
        return
    directory = store.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    place = Shared(SampleStore(directory, store.ffn, store.with_energy, store.with_heads), uuid.uuid4().hex)
    path = directory / Shared.FILE
    path.write_text(place.mark)
    try:
        yield place
    finally:
        path.unlink(missing_ok=True)


def _moments(sums: Arrays, num_tokens: int) -> Moments:
    return Moments({k: torch.from_numpy(v) for k, v in sums.items()}, num_tokens)
