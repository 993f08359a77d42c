# vLLM's own image with the plugin in it: everything but the two lines below is vLLM's.
#   docker build -t vllm-dejavu .
#   docker run --gpus all --ipc host -p 8000:8000 -v MODELS:/models vllm-dejavu /models/opt-6.7b --model-impl dejavu
ARG VLLM=v0.32.0
FROM vllm/vllm-openai:${VLLM}
COPY . /opt/vllm-dejavu
RUN pip install --no-build-isolation --no-deps /opt/vllm-dejavu
