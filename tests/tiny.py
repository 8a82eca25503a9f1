"""A tiny model made in the test: real mlx-lm code, random weights, nothing downloaded."""

from __future__ import annotations

from typing import Any

VOCABULARY = 160
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
}


def tiny_llama(*, tied: bool = False, quantized: dict[str, Any] | None = None) -> Any:
    """A llama in bf16 with the same weights each time, quantized with ``nn.quantize`` where asked."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models import llama

    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict({**CONFIG, "tie_word_embeddings": tied}))
    model.set_dtype(mx.bfloat16)
    if quantized:
        nn.quantize(model, **quantized)
    mx.eval(model.parameters())
    return model


def tiny_mixture() -> Any:
    """A Qwen3 mixture of experts, with QK-norm and stacked experts, quantized at 4 bits."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models import qwen3_moe

    config = {
        **CONFIG,
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 64,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        "norm_topk_prob": True,
    }
    mx.random.seed(0)
    model = qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=64, bits=4)
    mx.eval(model.parameters())
    return model


def finish(steps: Any) -> Any:
    """Run a generator to its end and give what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value
