"""Statistics and scores taken block by block must be those of the whole model."""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map_with_path
from mlx_lm.models import switch_layers

from mlxq.calibration.blocks import BlockSequence, NotSequentialError, find_blocks, intercepted, outside_of, quantizable
from mlxq.calibration.guided import guided_weights
from mlxq.calibration.sensitivity import divergence, scores
from mlxq.calibration.statistics import InputStatistics, ModuleInput, gather, input_statistics
from mlxq.calibration.streamed import streamed_model
from mlxq.calibration.tokens import SEQUENCE_TOKENS, calibration_text
from mlxq.methods.affine_fit import affine_fit
from mlxq.methods.formats import Format
from mlxq.methods.gptq import GPTQ, Feedback, feedback
from mlxq.pipeline import prepare
from mlxq.recipe.load import recipe_from_dict
from mlxq.sources.resolve import resolve
from tests.checkpoints import add_start_token, llama

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": {
        "tie_word_embeddings": False,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
}


def small_model(model_type: str) -> nn.Module:
    """A model of random float32 weights, the same each time."""
    module = import_module(f"mlx_lm.models.{model_type}")
    model: nn.Module = module.Model(
        module.ModelArgs.from_dict({"model_type": model_type, **COMMON, **MODELS[model_type]})
    )
    keys = iter(mx.random.split(mx.random.key(0), 500))

    def drawn(path: str, array: mx.array) -> mx.array:
        if "norm" in path:
            return mx.ones(array.shape)
        return mx.random.normal(array.shape, key=next(keys)) * (1.5 / math.sqrt(array.shape[-1]))

    model.update(tree_map_with_path(drawn, model.parameters()))
    mx.eval(model.parameters())
    return model


def text(sequences: int = 6) -> mx.array:
    return mx.random.randint(0, 96, (sequences, 24), key=mx.random.key(7))


def hessian_of(statistics: InputStatistics) -> mx.array:
    assert statistics.hessian is not None
    return statistics.hessian


def in_batches(tokens: mx.array, size: int) -> list[mx.array]:
    return [tokens[start : start + size] for start in range(0, tokens.shape[0], size)]


def fitted(path: str, weight: mx.array, fmt: Format, statistics: InputStatistics | None) -> mx.array:
    moment = None if statistics is None else statistics.second_moment
    return fmt.decode(affine_fit(weight, fmt, moment).arrays())


@pytest.mark.parametrize("model_type", MODELS)
def test_blocks_in_sequence_are_the_model(model_type: str) -> None:
    model, tokens = small_model(model_type), text()
    sequence = find_blocks(model)
    assert list(sequence.blocks) == [f"model.layers.{index}" for index in range(3)]
    entered = sequence.enter(tokens)
    hidden = entered.hidden
    for index in range(3):
        hidden = sequence.run(index, hidden, entered)
    assert mx.allclose(sequence.leave(tokens, hidden), model(tokens), atol=1e-4)
    assert entered.before == {"model.embed_tokens"}


@pytest.mark.parametrize("model_type", MODELS)
def test_statistics_are_those_of_the_whole_pass(model_type: str) -> None:
    model, tokens = small_model(model_type), text()
    inputs: dict[str, tuple[Any, ...]] = {}

    def keep(path: str, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs[path] = args
        return call(*args, **kwargs)

    inside = {path: m for path, m in quantizable(model).items() if path.startswith("model.layers")}
    with intercepted(inside, keep):
        model(tokens)
    gathered = dict(input_statistics(find_blocks(model), in_batches(tokens, 4)))
    head = "model.embed_tokens" if MODELS[model_type]["tie_word_embeddings"] else "lm_head"
    assert set(gathered) == {*inside, head}
    last = model.model(tokens).reshape(-1, 64)
    assert mx.allclose(hessian_of(gathered[head]), last.T @ last / last.shape[0], rtol=1e-3, atol=1e-4)
    for path, module in inside.items():
        if module.weight.ndim == 2:
            rows = inputs[path][0].reshape(-1, inputs[path][0].shape[-1])
            assert mx.allclose(hessian_of(gathered[path]), rows.T @ rows / rows.shape[0], rtol=1e-3, atol=1e-4)
            assert gathered[path].tokens == tokens.size


def test_each_expert_has_its_own_statistics() -> None:
    model = small_model("qwen3_moe")
    gathered = dict(input_statistics(find_blocks(model), in_batches(text(), 3)))
    experts = gathered["model.layers.1.mlp.switch_mlp.down_proj"]
    hessians = hessian_of(experts)
    assert hessians.shape == (4, 64, 64)
    assert experts.tokens == 2 * text().size
    assert not mx.allclose(hessians[0], hessians[1], rtol=0.05)
    assert bool((experts.second_moment > 0).all())


@pytest.mark.parametrize("hessian", [False, True])
def test_an_expert_the_text_hardly_reached_borrows_from_the_others(hessian: bool) -> None:
    """As much of the average expert as 64 tokens would give: half of what is said of one with 64 tokens of its own."""
    stack = switch_layers.SwitchLinear(8, 4, num_experts=3, bias=False)
    rows = mx.random.normal((256, 1, 8), key=mx.random.key(5))
    indices = mx.where(mx.arange(256) < 64, 0, 1)[:, None]
    x = mx.where(indices[..., None] == 0, 3.0, 1.0) * rows
    found = gather([ModuleInput(x, indices)], stack, hessian=hessian)
    assert found is not None
    squares = (x * x).reshape(256, 8)
    own, everybody = squares[:64].mean(axis=0), squares.mean(axis=0)
    assert mx.allclose(found.second_moment[2], everybody, rtol=1e-4)
    assert mx.allclose(found.second_moment[0], (own + everybody) / 2, rtol=1e-4)
    assert mx.allclose(found.second_moment[1], (192 * squares[64:].mean(axis=0) + 64 * everybody) / 256, rtol=1e-4)
    assert found.tokens == 256


def test_the_embedding_that_is_the_head_is_damped_as_one(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", tie_word_embeddings=True)
    recipe = recipe_from_dict({"default": {"bits": 4}, "method": "gptq", "calibration": {"tokens": 1024}}, "test")
    plan = prepare(recipe, resolve(str(model)))
    assert plan.architecture.tied_head == "model.embed_tokens"
    encoders = {"model.embed_tokens.weight": (GPTQ, Format(4, 64))}
    ((_, _, guide),) = guided_weights(plan, encoders)
    with streamed_model(plan.source, plan.architecture) as streamed:
        batches = calibration_text(plan.calibration, streamed).batches
        statistics = dict(input_statistics(streamed.sequence, batches, streamed.hold))["model.embed_tokens"]
    assert isinstance(guide, Feedback)
    expected = {damping: feedback(hessian_of(statistics), 64, damping).factor for damping in (0.01, 0.1)}
    assert mx.allclose(guide.factor, expected[0.1], rtol=1e-4)
    assert not mx.allclose(guide.factor, expected[0.01], rtol=0.05)


@pytest.mark.parametrize("text", ["builtin", "self"])
def test_calibration_and_held_out_sequences_begin_with_the_start_token(tmp_path: Path, text: str) -> None:
    model = llama(tmp_path / "model")
    calibration = {"text": text, "tokens": 1024}
    recipe = recipe_from_dict({"default": {"bits": 4}, "method": "gptq", "calibration": calibration}, "test")

    def rows() -> tuple[mx.array, tuple[int, ...], str]:
        plan = prepare(recipe, resolve(str(model)))
        with streamed_model(plan.source, plan.architecture) as streamed:
            found = calibration_text(plan.calibration, streamed)
        return mx.concatenate([*found.batches, *found.held_out]), found.info.start_tokens, found.info.ids_sha256

    plain, start, its_hash = rows()
    assert plain.shape[1] == SEQUENCE_TOKENS
    # Samples must begin with something, which the tokenizer names; text begins with itself.
    assert start == ((1,) if text == "self" else ())
    add_start_token(model)
    begun, start, other_hash = rows()
    assert begun.shape[1] == SEQUENCE_TOKENS
    assert start == (1,)
    assert mx.all(begun[:, 0] == 1)
    assert text == "self" or not mx.any(plain[:, 0] == 1)
    assert (its_hash == other_hash) is (text == "self")


def whole_pass_scores(model: nn.Module, tokens: mx.array, path: str, change: mx.array) -> float:
    """Half the mean over tokens of (g . D x)^2 by a gradient through the whole model, with the labels of ``scores``."""
    module = quantizable(model)[path]
    total = 0.0
    for row in range(tokens.shape[0]):
        line = tokens[row : row + 1]
        key = mx.random.split(mx.random.key(0), 2)[1] + line.sum().astype(mx.uint32)
        logits = model(line)
        labels = mx.random.categorical(logits - mx.logsumexp(logits, axis=-1, keepdims=True), key=key)
        seen: list[mx.array] = []

        def likelihood(probe: mx.array, line: mx.array = line, labels: mx.array = labels) -> mx.array:
            def add(name: str, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                return call(*args, **kwargs) + probe

            with intercepted({path: module}, add):
                logits = model(line)
            logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            return mx.take_along_axis(logits, labels[..., None], axis=-1).sum()

        def keep(name: str, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], seen: Any = seen) -> Any:
            seen.append(args[0])
            return call(*args, **kwargs)

        with intercepted({path: module}, keep):
            model(line)
        gradient = mx.grad(likelihood)(mx.zeros((1, line.shape[1], module.weight.shape[0])))
        effect = (gradient * (seen[0] @ change.T)).sum(axis=-1)
        total += (effect * effect).sum().item()
    return 0.5 * total / tokens.size


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_scores_are_those_of_the_whole_pass(model_type: str) -> None:
    model, tokens, fmt = small_model(model_type), text(), Format(3, 64)
    paths = ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.down_proj"]

    def plain(path: str, weight: mx.array, fmt: Format, statistics: InputStatistics | None) -> mx.array:
        return fmt.decode(affine_fit(weight, fmt).arrays())

    found = {
        s.path: s.divergence
        for s in scores(find_blocks(model), in_batches(tokens, 4), {p: [fmt] for p in paths}, plain)
    }
    for path in paths:
        weight = quantizable(model)[path].weight
        change = fmt.decode(affine_fit(weight, fmt).arrays()) - weight
        assert found[path] == pytest.approx(whole_pass_scores(model, tokens, path, change), rel=1e-2)


@pytest.mark.parametrize("model_type", MODELS)
def test_scores_rise_as_bits_fall_and_leave_the_model_alone(model_type: str) -> None:
    model, tokens = small_model(model_type), text(2)
    before = model(tokens)
    options = {path: [Format(bits, 32) for bits in (2, 4, 8)] for path in quantizable(model)}
    table: dict[str, list[float]] = {}
    for score in scores(find_blocks(model), in_batches(tokens, 2), options, fitted):
        table.setdefault(score.path, []).append(score.divergence)
    assert set(table) == set(options)
    assert all(two > four > eight >= 0 for two, four, eight in table.values())
    assert mx.array_equal(model(tokens), before)


def test_an_expert_stack_scores_the_same_however_many_tokens_pass_together() -> None:
    # mlx_lm sorts tokens by expert where there are many, and then repeats each for the experts it goes to.
    model, tokens, fmt = small_model("qwen3_moe"), text(), Format(3, 32)
    paths = [f"model.layers.1.mlp.switch_mlp.{name}" for name in ("up_proj", "down_proj")]

    def plain(path: str, weight: mx.array, fmt: Format, statistics: InputStatistics | None) -> mx.array:
        return fmt.decode(affine_fit(weight, fmt).arrays())

    few, many = (
        [s.divergence for s in scores(find_blocks(model), in_batches(tokens, size), {p: [fmt] for p in paths}, plain)]
        for size in (1, 6)
    )
    assert few == pytest.approx(many, rel=1e-3)


def test_no_score_falls_below_zero_where_nothing_is_lost() -> None:
    model = small_model("llama")
    # Logits next to zero: any head says the same, and what is measured of it is rounding.
    model.lm_head.weight = model.lm_head.weight * 1e-5
    options = {path: [Format(bits, 32) for bits in (4, 6, 8)] for path in ("lm_head", "model.embed_tokens")}
    found = list(scores(find_blocks(model), in_batches(text(), 2), options, fitted))
    assert len(found) == 6
    assert all(score.divergence >= 0 for score in found)


def test_the_sum_of_scores_predicts_the_divergence() -> None:
    model, tokens, fmt = small_model("llama"), text(32), Format(6, 64)
    reference = model(tokens)
    options = {path: [fmt] for path in quantizable(model)}
    predicted = sum(s.divergence for s in scores(find_blocks(model), in_batches(tokens, 8), options, fitted))
    for module in quantizable(model).values():
        module.weight = fmt.decode(affine_fit(module.weight, fmt).arrays())
    assert predicted == pytest.approx(divergence(reference, model(tokens)).mean().item(), rel=0.4)


def test_a_tied_embedding_is_encoded_for_what_it_multiplies_as_the_head() -> None:
    model, tokens = small_model("qwen3"), text()
    given: list[InputStatistics | None] = []

    def noted(path: str, weight: mx.array, fmt: Format, statistics: InputStatistics | None) -> mx.array:
        given.append(statistics)
        return fitted(path, weight, fmt, statistics)

    options = {"model.embed_tokens": [Format(3, 32)]}
    found = list(scores(find_blocks(model), in_batches(tokens, 3), options, noted))
    last = model.model(tokens).reshape(-1, 64)
    assert given
    for statistics in given:
        assert statistics is not None
        assert mx.allclose(statistics.second_moment, (last * last).mean(axis=0), rtol=1e-3)
    # Changed at both ends, as the quantized model's would be.
    embedding = model.model.embed_tokens
    before = model(tokens)
    embedding.weight = fitted("", embedding.weight, Format(3, 32), given[0])
    assert found[0].divergence == pytest.approx(float(divergence(before, model(tokens)).mean()), rel=1e-3)


def test_outside_holds_what_no_block_does() -> None:
    model = small_model("llama")
    assert set(outside_of(model, find_blocks(model).blocks)) == {"model.embed_tokens", "lm_head"}


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(NotSequentialError, match="no list of blocks"):
        find_blocks(nn.Linear(4, 4))


def test_blocks_called_out_of_sequence_are_refused() -> None:
    class Parallel(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(4, 4), nn.Linear(4, 4)]

        def __call__(self, x: mx.array) -> mx.array:
            both: mx.array = self.layers[0](x) + self.layers[1](x)
            return both

    model = Parallel()
    sequence = BlockSequence(model, {f"layers.{index}": layer for index, layer in enumerate(model.layers)})
    with pytest.raises(NotSequentialError, match=r"layers\.1 is not called on the output"):
        sequence.enter(mx.ones((1, 4)))
    assert type(model.layers[0]) is nn.Linear


class _Twice(nn.Module):  # type: ignore[misc]
    """A block that multiplies twice, by one matrix or by two that are equal."""

    def __init__(self, weight: mx.array, shared: bool) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64, bias=False)
        self.first.weight = weight
        if not shared:
            self.second = nn.Linear(64, 64, bias=False)
            self.second.weight = weight

    def __call__(self, x: mx.array) -> mx.array:
        again = self.second if "second" in self else self.first
        result: mx.array = x + mx.tanh(self.first(x)) + again(x * x)
        return result


class _Small(nn.Module):  # type: ignore[misc]
    """An embedding, two blocks and a head; ``streams`` copies of the hidden states where there are several."""

    def __init__(self, shared: bool = True, streams: int = 0) -> None:
        super().__init__()
        keys = mx.random.split(mx.random.key(3), 4)
        self.embed = nn.Embedding(96, 64)
        self.embed.weight = mx.random.normal((96, 64), key=keys[0])
        self.layers = [_Twice(mx.random.normal((64, 64), key=key) * 0.1, shared) for key in keys[1:3]]
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = mx.random.normal((96, 64), key=keys[3]) * 0.1
        self._streams = streams

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embed(tokens)
        if self._streams:
            x = mx.stack([x] * self._streams)
        for layer in self.layers:
            x = layer(x)
        logits: mx.array = self.head(x[0] if self._streams else x)
        return logits


def test_a_module_called_twice_is_scored_for_both_calls() -> None:
    fmt, tokens = Format(3, 32), in_batches(text(), 3)

    def plain(path: str, weight: mx.array, fmt: Format, statistics: InputStatistics | None) -> mx.array:
        return fmt.decode(affine_fit(weight, fmt).arrays())

    shared = list(scores(find_blocks(_Small()), tokens, {"layers.1.first": [fmt]}, plain))
    apart = {"layers.1.first": [fmt], "layers.1.second": [fmt]}
    both = list(scores(find_blocks(_Small(shared=False)), tokens, apart, plain))
    assert len(both) == 2
    assert shared[0].divergence == pytest.approx(sum(score.divergence for score in both), rel=1e-3)


def test_blocks_that_are_given_several_streams_are_refused() -> None:
    with pytest.raises(NotSequentialError, match="not a vector for each"):
        find_blocks(_Small(streams=4)).enter(text())
