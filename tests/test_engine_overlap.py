"""Neurons predicted beside the attention, with stand-ins for CUDA's streams: the same, and waited for."""

from __future__ import annotations

import contextlib

import torch
from engine import Recorder, engine, metrics_of, model_of, random_prompt, run_requests

from vllm_dejavu import ops

ARRIVALS = {0: {"a": random_prompt(20), "b": random_prompt(9)}, 3: {"c": random_prompt(5)}}


class SideStream:
    """Its events in the order in which they were recorded, and in which somebody waited for them."""

    def __init__(self):
        self.recorded, self.waited = [], []

    def wait_stream(self, other):
        assert other is not self

    def record_event(self):
        self.recorded.append(Event(self))
        return self.recorded[-1]


class Event:
    def __init__(self, stream):
        self.stream = stream

    def wait(self):
        self.stream.waited.append(self)


def test_what_is_predicted_early_is_what_is_predicted_late(opt, predictors, monkeypatch):
    side = SideStream()
    monkeypatch.setattr(ops, "_side_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", object)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    model = opt()
    artifact = predictors(model, mlp="attn_input")

    def run(early):
        with engine(model, dejavu={"predictor": artifact}) as llm:
            layers = model_of(llm).model.decoder.local_layers()
            for layer in layers:
                layer.mlp.early = early
            with Recorder(llm) as recorder:
                tokens = run_requests(llm, ARRIVALS, 6)
            masks = [
                {key: None if gate is None else gate[0].tolist() for key, gate in step.gates.items()}
                for step in recorder.steps
            ]
            blocks = len(layers) * sum(step.sparse for step in recorder.steps)
            return tokens, masks, metrics_of(llm)["layers"], blocks

    late = run(False)
    assert not side.recorded
    early = run(True)
    assert early == late
    assert len(side.recorded) == early[-1] > 0
    assert side.waited == side.recorded, "each MLP waits for its own prediction, once"
