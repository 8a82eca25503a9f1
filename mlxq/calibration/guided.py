"""Weights beside what calibration says of their inputs, block by block, for the encoders that use it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from mlxq.calibration.statistics import InputStatistics, input_statistics
from mlxq.calibration.streamed import streamed_model
from mlxq.calibration.tokens import calibration_text
from mlxq.methods.encode import Guide
from mlxq.methods.formats import Format
from mlxq.methods.gptq import DAMPING, TIED_DAMPING, Feedback, feedback

if TYPE_CHECKING:
    import mlx.core as mx

    from mlxq.planning.plan import Plan

# A stack of experts whose Hessians would take more is encoded by ``fit``, which needs one number per input.
HESSIAN_BYTES = 2 << 30


def guided_weights(
    plan: Plan, formats: Mapping[str, Format], methods: Mapping[str, str], *, trust_remote_code: bool = False
) -> Iterator[tuple[str, mx.array, Guide]]:
    """The fp32 weight of each parameter of ``formats`` with its guide, in the order of the model's blocks.

    ``methods`` says which of them need error feedback. A module that the text never reaches comes last, with a
    guide that says nothing.
    """
    import mlx.core as mx

    waiting = dict(formats)
    with streamed_model(plan.source, plan.architecture, trust_remote_code=trust_remote_code) as streamed:
        text = calibration_text(plan.recipe.calibration, streamed)
        modules = dict(streamed.sequence.model.named_modules())
        prepared: tuple[InputStatistics, int, Feedback] | None = None

        def wants_hessian(path: str) -> bool:
            return methods.get(f"{path}.weight") == "gptq" and hessian_bytes(modules[path].weight.shape) < HESSIAN_BYTES

        for path, statistics in input_statistics(streamed.sequence, text.batches, streamed.hold, wants_hessian):
            name = f"{path}.weight"
            fmt = waiting.pop(name, None)
            if fmt is None:
                continue
            ahead = None
            if statistics.hessian is not None:
                # Modules on the same inputs (queries, keys, values) share what is prepared from them.
                if prepared is None or prepared[0] is not statistics or prepared[1] != fmt.group_size:
                    damping = TIED_DAMPING if path == plan.architecture.tied_head else DAMPING
                    prepared = (statistics, fmt.group_size, feedback(statistics.hessian, fmt.group_size, damping))
                ahead = prepared[2]
            # Evaluated here: another thread encodes by it, and work that waits belongs to this thread's stream.
            mx.eval(statistics.second_moment, [ahead.order, ahead.factor] if ahead else [])
            yield name, modules[path].weight, Guide(statistics.second_moment, ahead)
        for path in streamed.sequence.blocks:
            left = [name for name in waiting if name.startswith(f"{path}.")]
            if left:
                with streamed.hold(path):
                    for name in left:
                        yield name, modules[name.rpartition(".")[0]].weight, Guide()
                        del waiting[name]
        for name in waiting:
            yield name, modules[name.rpartition(".")[0]].weight, Guide()


def hessian_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of the fp32 Hessians of a weight (..., rows, columns)."""
    experts = shape[0] if len(shape) == 3 else 1
    return int(experts * shape[-1] ** 2 * 4)
