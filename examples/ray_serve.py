"""OPT with predictor-gated layers behind Ray Serve: replicas that stream text, report densities and switch to
dense.

    cd examples && serve run --working-dir . ray_serve:build model=$PWD/opt-books-7m        # and then
    curl -N localhost:8000/generate -H 'content-type: application/json' -d '{"prompt": "The house stood",
    "max_tokens": 32}' curl localhost:8000/densities

Needs `pip install 'ray[serve]'`. Arguments of `build` are KEY=VALUE: model, predictor (default:
MODEL/dejavu), replicas, gpus (of each replica, 0 on a CPU), and max_model_len. vllm-dejavu must be installed
on every node, and the model and the artifact must be found there.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from ray import serve

api = FastAPI()


class Generate(BaseModel):
    prompt: str
    max_tokens: int = 64
    temperature: float = 0.0


@serve.deployment
@serve.ingress(api)
class DejaVu:
    """One engine. Its workers run inside of the replica's own resources."""

    def __init__(self, model: str, predictor: str | None, options: dict[str, Any]):
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        settings = {} if predictor is None else {"predictor": predictor}
        self.engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=model, model_impl="dejavu", additional_config={"dejavu": settings}, **options
            )
        )

    async def check_health(self) -> None:
        """Ray Serve replaces a replica whose engine has died."""
        await self.engine.check_health()

    @api.post("/generate")
    async def generate(self, request: Generate) -> StreamingResponse:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            output_kind=RequestOutputKind.DELTA,
        )

        async def pieces() -> AsyncIterator[str]:
            async for output in self.engine.generate(request.prompt, params, request_id=str(uuid.uuid4())):
                yield output.outputs[0].text

        return StreamingResponse(pieces(), media_type="text/plain")

    @api.get("/densities")
    async def densities(self) -> dict[str, Any]:
        from vllm_dejavu.metrics import summarize

        summary = summarize(await self.engine.collective_rpc("dejavu_metrics"))
        return {
            key: summary[key]
            for key in ("sparse_step_share", "mlp_density", "head_density", "dense_switch", "artifact")
        }

    @api.post("/dense/{on}")
    async def dense(self, on: bool) -> None:
        """The quality switch, of the replica that this request reaches."""
        from vllm_dejavu.control import set_dense_async

        await set_dense_async(self.engine, on)


def build(args: dict[str, str]) -> serve.Application:
    gpus = float(args.get("gpus", 0))
    options = {"max_model_len": int(args["max_model_len"])} if "max_model_len" in args else {}
    deployment = DejaVu.options(
        num_replicas=int(args.get("replicas", 1)), ray_actor_options={"num_gpus": gpus} if gpus else {}
    )
    return deployment.bind(args["model"], args.get("predictor"), options)
