"""Requests over HTTP that a server must refuse, and the good ones that they are made of."""

from __future__ import annotations

import json
import sys

from serving import (
    SCRIPTS,
)

sys.path.insert(0, str(SCRIPTS))

QUESTION = [
    {"role": "system", "content": "Speak."},
    {"role": "user", "content": "What did the old gentleman say?"},
]
GREEDY = {"model": "tiny", "max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


def changed(**changes) -> bytes:
    return json.dumps({**GREEDY, "prompt": "It was late", **changes}).encode()


def chat(**changes) -> bytes:
    return json.dumps({**GREEDY, "messages": QUESTION, **changes}).encode()


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MALFORMED = {
    "no-json": (COMPLETIONS, b"{"),
    "empty": (COMPLETIONS, b""),
    "list": (COMPLETIONS, b"[]"),
    "null": (COMPLETIONS, b"null"),
    "bytes": (COMPLETIONS, b"\xff\xfe{}"),
    "prompt-number": (COMPLETIONS, changed(prompt=7)),
    "prompt-object": (COMPLETIONS, changed(prompt={"a": 1})),
    "prompt-mixed": (COMPLETIONS, changed(prompt=[2, "x"])),
    "prompt-empty": (COMPLETIONS, changed(prompt="")),
    "prompt-null": (COMPLETIONS, changed(prompt=None)),
    "prompt-float": (COMPLETIONS, changed(prompt=[2.5])),
    "token-too-large": (COMPLETIONS, changed(prompt=[2, 8192])),
    "token-negative": (COMPLETIONS, changed(prompt=[2, -1])),
    "token-huge": (COMPLETIONS, changed(prompt=[2, 10**30])),
    "prompt-too-long": (COMPLETIONS, changed(prompt=[5] * 600)),
    "text-too-long": (COMPLETIONS, changed(prompt="It was late " * 1000)),
    "more-than-fits": (COMPLETIONS, changed(max_tokens=10**6)),
    "max-tokens-negative": (COMPLETIONS, changed(max_tokens=-1)),
    "max-tokens-word": (COMPLETIONS, changed(max_tokens="many")),
    "max-tokens-0": (COMPLETIONS, changed(max_tokens=0)),
    "min-tokens-above-max": (COMPLETIONS, changed(min_tokens=99)),
    "model-unknown": (COMPLETIONS, changed(model="gpt-9")),
    "model-number": (COMPLETIONS, changed(model=7)),
    "n-0": (COMPLETIONS, changed(n=0)),
    "n-negative": (COMPLETIONS, changed(n=-1)),
    "n-huge": (COMPLETIONS, changed(n=10**9, temperature=1)),
    "n-greedy": (COMPLETIONS, changed(n=2)),
    "bias-no-token": (COMPLETIONS, changed(logit_bias={"x": 1})),
    "bias-unknown-token": (COMPLETIONS, changed(logit_bias={"999999": 1})),
    "bias-negative-token": (COMPLETIONS, changed(logit_bias={"-1": 1})),
    "bias-word": (COMPLETIONS, changed(logit_bias={"5": "much"})),
    "bias-list": (COMPLETIONS, changed(logit_bias=[1])),
    "temperature-negative": (COMPLETIONS, changed(temperature=-1)),
    "temperature-nan": (COMPLETIONS, changed(temperature=float("nan"))),
    "temperature-word": (COMPLETIONS, changed(temperature="hot")),
    "top-p-2": (COMPLETIONS, changed(top_p=2)),
    "top-k-negative": (COMPLETIONS, changed(top_k=-5)),
    "stop-empty": (COMPLETIONS, changed(stop=[""])),
    "logprobs-negative": (COMPLETIONS, changed(logprobs=-5)),
    "logprobs-many": (COMPLETIONS, changed(logprobs=10**6)),
    "stream-word": (COMPLETIONS, changed(stream="perhaps")),
    "chat-no-messages": (CHAT, chat(messages=None)),
    "chat-empty-message": (CHAT, chat(messages=[{}])),
    "chat-text": (CHAT, chat(messages="hello")),
    "chat-own-template": (CHAT, chat(chat_template="{{ messages }}")),
    "chat-model-unknown": (CHAT, chat(model="gpt-9")),
}
