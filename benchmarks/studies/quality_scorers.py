"""Scorers of the quality study: log-likelihoods from masks in transformers, or from the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from quality_masks import BATCH_TOKENS, Batch, Masks
from quality_tasks import Score, Text

from vllm_dejavu.predictor_training.hf_model import HfModel


class MaskedScorer:
    """The model in transformers under a point's masks."""

    def __init__(self, opt: HfModel, masks: Masks, batch_tokens: int = BATCH_TOKENS):
        self.opt, self.masks, self.batch_tokens = opt, masks, batch_tokens

    @torch.inference_mode()
    def score(self, texts: Sequence[Text]) -> list[Score]:
        """Longest texts first, in batches of similar lengths. What pads them stands behind them, where a
        causal model does not look.
        """
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i].tokens))
        out: dict[int, Score] = {}
        with self.opt.observed(self.masks.on_attention, self.masks.on_mlp):
            while order:
                size = max(1, self.batch_tokens // len(texts[order[0]].tokens))
                chosen, order = order[:size], order[size:]
                out.update(zip(chosen, self._batch([texts[i] for i in chosen]), strict=True))
        return [out[i] for i in range(len(texts))]

    def _batch(self, texts: list[Text]) -> list[Score]:
        opt, shape = self.opt, (len(texts), len(texts[0].tokens))
        tokens = torch.full(shape, opt.bos, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text.tokens)] = torch.tensor(text.tokens)
        lengths = torch.tensor([len(t.tokens) for t in texts])
        place = torch.arange(shape[1])
        starts = torch.tensor([t.start for t in texts])
        scored = (place[None, 1:] >= starts[:, None]) & (place[None, 1:] < lengths[:, None])
        self.masks.batch = Batch(
            (place[None, :] < lengths[:, None]).flatten().to(opt.device),
            place.repeat(shape[0]).to(opt.device),
            shape,
            [t.tokens for t in texts],
        )
        hidden = opt.model.model(input_ids=tokens.to(opt.device), use_cache=False).last_hidden_state
        logits = opt.model.lm_head(hidden[:, :-1][scored.to(hidden.device)]).float()
        targets = tokens[:, 1:][scored].to(logits.device)
        chosen = logits.gather(1, targets[:, None])[:, 0]
        nll = (logits.logsumexp(1) - chosen).double().cpu()
        correct = (chosen >= logits.amax(1)).cpu()  # as the engine's rank 1
        counts = scored.sum(1).tolist()
        return [Score(n, c) for n, c in zip(nll.split(counts), correct.split(counts), strict=True)]


class EngineScorer:
    """A vLLM engine of the serving model class."""

    def __init__(self, llm: Any):
        self.llm = llm

    def score(self, texts: Sequence[Text]) -> list[Score]:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0, detokenize=False)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i].tokens))
        out: dict[int, Score] = {}
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(texts[i].tokens)} for i in order], params, use_tqdm=False
        )
        for i, output in zip(order, outputs, strict=True):
            text = texts[i]
            entries = [
                e[t]
                for e, t in zip(output.prompt_logprobs[text.start :], text.tokens[text.start :], strict=True)
            ]
            out[i] = Score(
                -torch.tensor([e.logprob for e in entries], dtype=torch.float64),
                torch.tensor([e.rank == 1 for e in entries]),
            )
        return [out[i] for i in range(len(texts))]
