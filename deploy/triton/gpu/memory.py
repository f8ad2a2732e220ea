"""GPU memory, by arithmetic: what the weights take, what one token of context takes, how much context is left.

    weights  = (parameters - embeddings) x bytes per weight + embeddings x 2     (embeddings stay at 16 bits)
    KV/token = 2 (K and V) x layers x KV heads x head size x bytes per value
    KV pool  = 0.9 x (GPU memory - weights per GPU - 2.5 GiB), on every GPU

The 2.5 GiB for activations, CUDA and buffers are an allowance, not a measurement: it grows with `step_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass

from variant import Base, Format, Variant

GIB = 2**30
KV_SHARE = 0.9
ALLOWANCE_GIB = 2.5

# With the scales of a group of 128 weights: 16 bits each for AWQ, and 4 bits more for GPTQ's zero point.
BYTES_PER_WEIGHT: dict[Format, float] = {
    "16bit": 2.0,
    "fp8": 1.0,
    "int8_sq": 1.0,
    "int4_awq": 0.5 + 2 / 128,
    "int4_gptq": 0.5 + 2.5 / 128,
}
BYTES_PER_KV_VALUE = {"16bit": 2, "fp8": 1}


@dataclass(frozen=True)
class Memory:
    weights_gib: float
    weights_per_gpu_gib: float
    kv_bytes_per_token: int
    kv_pool_gib: float
    kv_pool_tokens: int
    full_sequences: float


def weights_gib(base: Base, stored: Format) -> float:
    """All weights of a model, over all GPUs."""
    embeddings = base.vocabulary * base.hidden * (1 if base.tied_embeddings else 2)
    rest = base.parameters_billion * 1e9 - embeddings
    return (rest * BYTES_PER_WEIGHT[stored] + embeddings * 2) / GIB


def kv_bytes_per_token(base: Base, stored: str) -> int:
    """Over all GPUs: tensor parallelism splits the heads, pipeline parallelism the layers."""
    return 2 * base.layers * base.kv_heads * base.head_dim * BYTES_PER_KV_VALUE[stored]


def estimate(variant: Variant) -> Memory:
    """What `variant` needs on its GPUs, a draft model included. A pool below one full sequence means: does not fit."""
    gpus, draft = variant.hardware.gpus, variant.draft
    weights = weights_gib(variant.base, variant.weights.format)
    per_token = kv_bytes_per_token(variant.base, variant.kv_cache)
    if draft:
        weights += weights_gib(draft.base, draft.weights.format)
        per_token += kv_bytes_per_token(draft.base, variant.kv_cache)
    pool = KV_SHARE * (variant.hardware.gpu_memory_gib - weights / gpus - ALLOWANCE_GIB) * gpus
    tokens = int(pool * GIB / per_token)
    if variant.limits.kv_cache_tokens is not None:
        tokens = min(tokens, variant.limits.kv_cache_tokens)
        pool = tokens * per_token / GIB
    return Memory(weights, weights / gpus, per_token, pool, tokens, tokens / variant.limits.sequence_tokens)
