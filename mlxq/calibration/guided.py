"""Weights beside what calibration says of their inputs, block by block, for the encoders that use it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from mlxq.calibration.statistics import InputStatistics, input_statistics
from mlxq.calibration.streamed import streamed_model
from mlxq.calibration.tokens import calibration_text
from mlxq.methods.formats import Format
from mlxq.methods.method import Guide, Method, Needs

if TYPE_CHECKING:
    import mlx.core as mx

    from mlxq.planning.plan import Plan


def guided_weights(plan: Plan, encoders: Mapping[str, tuple[Method, Format]]) -> Iterator[tuple[str, mx.array, Guide]]:
    """The fp32 weight of each parameter of ``encoders`` with its guide, in the order of the model's blocks.

    A module that the text never reaches comes last, with a guide that says nothing.
    """
    import mlx.core as mx

    waiting = dict(encoders)
    with streamed_model(plan.source, plan.architecture) as streamed:
        text = calibration_text(plan.calibration, streamed)
        modules = dict(streamed.sequence.model.named_modules())
        # Modules on the same inputs (queries, keys, values) share one guide.
        last: tuple[InputStatistics, tuple[Method, Format, bool], Guide] | None = None

        def wants_hessian(path: str) -> bool:
            asked = encoders.get(f"{path}.weight")
            return asked is not None and Needs.HESSIANS in asked[0].uses

        for path, statistics in input_statistics(streamed.sequence, text.batches, streamed.hold, wants_hessian):
            name = f"{path}.weight"
            encoder = waiting.pop(name, None)
            if encoder is None:
                continue
            method, fmt = encoder
            terms = (method, fmt, path == plan.architecture.tied_head)
            if last is None or last[0] is not statistics or last[1] != terms:
                guide = method.guide(statistics.second_moment, statistics.hessian, fmt, tied=terms[2])
                # Evaluated here: another thread encodes by it, and work that waits belongs to this thread's stream.
                mx.eval(guide.arrays())
                last = (statistics, terms, guide)
            yield name, modules[path].weight, last[2]
        for path in streamed.sequence.blocks:
            left = [name for name in waiting if name.startswith(f"{path}.")]
            if left:
                with streamed.hold(path):
                    for name in left:
                        yield name, modules[name.rpartition(".")[0]].weight, Guide()
                        del waiting[name]
        for name in waiting:
            yield name, modules[name.rpartition(".")[0]].weight, Guide()
