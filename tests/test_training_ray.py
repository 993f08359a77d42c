"""`--ray` on a real cluster of this machine: the same moments, shards and artifact as one process, whatever
dies on the way.
"""

import os
import signal
import socket
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from conftest import HANG_S
from local_ray import local_ray
from safetensors.torch import load_file

from vllm_dejavu.predictor_training import distributed, pipeline
from vllm_dejavu.predictor_training.collect import Collector, Request
from vllm_dejavu.predictor_training.config import TrainConfig
from vllm_dejavu.predictor_training.distributed import OnRay, Shared, Worker, in_order, shared
from vllm_dejavu.predictor_training.hf_model import HfModel
from vllm_dejavu.predictor_training.pipeline import Local
from vllm_dejavu.predictor_training.samples import SampleStore

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'vllm-dejavu[ray]'")

BATCH = 2
REQUEST = Request({"mlp": ("previous",), "attention": ("previous",)}, range(3), sample_stride=5)


@pytest.fixture(scope="module")
def cluster():
    """Address of a Ray cluster of this process's own; its environment is as before afterwards."""
    with local_ray(num_cpus=2, object_store_memory=200 * 2**20, log_to_driver=False) as address:
        yield address


@pytest.fixture(scope="module")
def model(opt):
    return HfModel(str(opt()))


@pytest.fixture(scope="module")
def tokens():
    """Windows that neither batches nor chunks divide evenly, with a stride that no batch is a multiple of."""
    return torch.randint(3, tiny.VOCAB, (23, 33), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def alone(model, tokens, tmp_path_factory):
    """Moments and shards of one process."""
    directory = tmp_path_factory.mktemp("alone")
    return (
        Local(model, BATCH).collect(REQUEST, tokens, directory / "moments", {}, store(directory)),
        directory,
    )


def store(directory: Path) -> SampleStore:
    return SampleStore(directory / "samples", 256, with_energy=True, with_heads=True)


class Observed(OnRay):
    """Knows its workers, so that a test can kill one."""

    @contextmanager
    def _workers(self, count):
        with super()._workers(count) as self.workers:
            yield self.workers

    def pid(self, index):
        return int(ray.get(self.workers[index].place.remote()).rpartition(" ")[2])


def on_ray(cluster, model, workers=2) -> Observed:
    return Observed(
        TrainConfig(model=model.name, data=("self",), output="unused", batch=BATCH), model, cluster, workers
    )


def assert_same(found, expected):
    assert found.num_tokens == expected.num_tokens and found.tensors.keys() == expected.tensors.keys()
    for name, value in expected.tensors.items():
        assert found.tensors[name].dtype == torch.float64
        assert (found.tensors[name] - value).abs().max() <= 1e-12 * value.abs().max(), name


def test_two_workers_collect_what_one_process_does(cluster, model, tokens, alone, tmp_path):
    """Shards too: neither their names nor the tokens in them depend on who wrote them."""
    moments, directory = alone
    arrived = []
    found = on_ray(cluster, model).collect(
        REQUEST, tokens, tmp_path / "moments", {}, store(tmp_path), progress=arrived.append
    )
    assert_same(found, moments)
    assert sum(arrived) == tokens.numel() and len(arrived) >= 2 * distributed.CHUNKS_A_WORKER
    expected, got = (
        {p.relative_to(d): load_file(p) for p in (d / "samples").rglob("*.*")} for d in (directory, tmp_path)
    )
    assert got.keys() == expected.keys() and len(got) == 3 * 12
    for name, tensors in expected.items():
        assert all(torch.equal(got[name][k], v) for k, v in tensors.items()), name


def test_a_killed_worker_costs_time_only(cluster, model, tokens, alone, tmp_path, capsys):
    """Whatever it was doing: computing, or about to be asked."""
    workers, killed = on_ray(cluster, model), []

    def kill_once(count):
        if not killed:
            killed.append(workers.pid(0))
            os.kill(killed[0], signal.SIGKILL)

    assert_same(
        workers.collect(REQUEST, tokens, tmp_path / "moments", {}, None, progress=kill_once), alone[0]
    )
    assert f"process {killed[0]}" in capsys.readouterr().err


class Killed(BaseException):
    """Stands for a kill signal to the driver."""


def test_a_killed_driver_resumes_alone_or_on_ray(cluster, model, tokens, alone, tmp_path, monkeypatch):
    checkpoint, samples, arrived = tmp_path / "moments", store(tmp_path), []
    Collector(model, REQUEST, checkpoint, {}, samples).run(tokens[:6], BATCH, progress=lambda n: None)
    monkeypatch.setattr(distributed, "SAVE_EVERY_S", -1)

    def progress(count):
        arrived.append(count)
        if len(arrived) == 2:
            raise Killed

    with pytest.raises(Killed):
        on_ray(cluster, model, workers=1).collect(REQUEST, tokens, checkpoint, {}, samples, progress=progress)
    assert arrived == [3 * BATCH * 33] * 2
    collector = Collector(model, REQUEST, checkpoint, {}, samples)
    resumed = collector.run(tokens, BATCH, progress=arrived.append)
    assert sum(arrived) == (23 - 6 + 3 * BATCH) * 33  # the chunk that the driver died in, twice
    assert_same(resumed, alone[0])


@pytest.mark.on_demand
def test_the_whole_pipeline_gives_the_artifact_of_one_machine(cluster, opt, tmp_path):
    def run(name, **options):
        config = TrainConfig(
            model=str(opt()),
            data=("self",),
            output=str(tmp_path / name),
            seq_len=64,
            max_tokens=2048,
            valid_tokens=512,
            rank=16,
            head_form="paper",
            max_ppl_increase=0.1,
            dtype="float32",
        )
        return pipeline.run(config, **options), load_file(tmp_path / name / "predictors.safetensors")

    (here, expected), (there, found) = run("alone"), run("ray", ray=cluster)
    for one, other in zip(here.manifest.layers, there.manifest.layers, strict=True):
        assert {block: (gate.state, gate.lookahead, gate.rank) for block, gate in one.items()} == {
            block: (gate.state, gate.lookahead, gate.rank) for block, gate in other.items()
        }
    assert any(gate.sparse for layer in here.manifest.layers for gate in layer.values())
    assert found.keys() == expected.keys()
    for name, value in products(expected).items():
        torch.testing.assert_close(products(found)[name], value, rtol=1e-4, atol=1e-4)
    assert sorted(p.name for p in (tmp_path / "ray.run").iterdir()) == sorted(
        p.name for p in (tmp_path / "alone.run").iterdir()
    )


def products(tensors):
    """Low-rank factors multiplied: rounding may turn a basis, not what it spans."""
    ups = {name.removesuffix("up"): up for name, up in tensors.items() if name.endswith(".up")}
    others = {name: value for name, value in tensors.items() if not name.endswith((".up", ".down"))}
    return others | {prefix: up @ tensors[prefix + "down"] for prefix, up in ups.items()}


class TestInOrder:
    """The scheduler, with workers that do as their chunk says."""

    @staticmethod
    def workers(count, act):
        class Actor:
            def place(self):
                return f"here, process {os.getpid()}"

            def collect(self, start):
                act(start)
                return start, {}

        return [
            ray.remote(Actor).options(num_cpus=1, max_restarts=-1, max_task_retries=0).remote()
            for _ in range(count)
        ]

    @staticmethod
    def run(workers, chunks):
        return in_order(
            workers, chunks, lambda worker, chunk: worker.collect.options(num_returns=2).remote(chunk.start)
        )

    def test_a_slow_worker_changes_no_order_and_others_wait_for_it_in_bounds(self, cluster, tmp_path):
        def act(start):
            (tmp_path / str(start)).touch()
            if start == 0:  # the slowest of all: until the other worker has done what it may
                hung = time.monotonic() + HANG_S
                while not (tmp_path / "3").exists():
                    assert time.monotonic() < hung, "the other worker never came"
                    time.sleep(0.01)

        found, taken = [], None
        for start, _ in self.run(self.workers(2, act), [range(i, i + 1) for i in range(9)]):
            taken = taken or len(list(tmp_path.iterdir()))
            found.append(start)
        assert found == list(range(9)) and taken == 2 * distributed.CHUNKS_AHEAD

    def test_workers_that_find_no_room_are_not_waited_for(self, cluster):
        found = [
            start
            for start, _ in self.run(self.workers(5, lambda start: None), [range(i, i + 1) for i in range(8)])
        ]
        assert found == list(range(8))

    def test_a_workers_error_is_the_drivers_and_not_tried_again(self, cluster, tmp_path):
        def act(start):
            (tmp_path / f"{start} {time.monotonic_ns()}").touch()
            if start == 1:
                raise KeyError("no such token")

        with pytest.raises(KeyError, match="no such token"):
            list(self.run(self.workers(1, act), [range(i, i + 1) for i in range(3)]))
        assert len(list(tmp_path.iterdir())) == 2

    def test_a_chunk_that_kills_every_worker_is_given_up(self, cluster, monkeypatch):
        monkeypatch.setattr(distributed, "MAX_DEATHS", 2)
        with pytest.raises(ChildProcessError, match=r"Windows 1-1 killed 2 workers.*--ray-workers"):
            list(
                self.run(
                    self.workers(1, lambda start: start == 1 and os.kill(os.getpid(), signal.SIGKILL)),
                    [range(i, i + 1) for i in range(3)],
                )
            )


def test_a_node_without_the_drivers_files_says_which(model, tmp_path):
    """What a worker on another host meets, in this process."""
    config = TrainConfig(model=model.name, data=("self",), output="unused")
    with pytest.raises(ValueError, match="other weights"):
        _ = Worker(config, "another fingerprint", 1).model
    with shared(store(tmp_path)) as place:
        assert place.seen().directory == tmp_path / "samples"
        with pytest.raises(ValueError, match="does not see .*samples.* --run-dir"):
            Shared(place.store, "of another directory that has this name").seen()
    assert not list((tmp_path / "samples").iterdir())


class TestConnecting:
    def test_no_cluster(self, cluster, monkeypatch):
        def init(**_):
            raise ConnectionError("Could not find any running Ray instance.")

        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", init)
        with pytest.raises(ValueError, match=r"--ray auto: Could not find .*`ray start --head`"):
            distributed.connect("auto")

    def test_nobody_at_the_address(self, monkeypatch):
        """Ray itself tries for minutes."""
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        with socket.socket() as taken:  # by us, who do not listen
            taken.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(ValueError, match=rf"--ray {address}: .*refused.*`ray start --head`"):
                distributed.connect(address)

    def test_ray_not_installed(self, monkeypatch):
        monkeypatch.setattr(distributed, "ray", None)
        with pytest.raises(ValueError, match=r"pip install 'vllm-dejavu\[ray\]'"):
            distributed.connect("auto")

    @pytest.mark.parametrize(
        ("changes", "workers", "message"),
        [({}, 0, "--ray-workers 0"), ({"device": "cuda"}, None, "no node .* GPU")],
        ids=["none", "on-a-missing-device"],
    )
    def test_impossible_workers(self, cluster, model, changes, workers, message):
        with pytest.raises(ValueError, match=message):
            OnRay(
                TrainConfig(model=model.name, data=("self",), output="unused", **changes),
                model,
                cluster,
                workers,
            )
