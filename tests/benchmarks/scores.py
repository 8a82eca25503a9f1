"""Do scores predict? Rank correlation of summed score and measured KL over random assignments of formats.

    python tests/benchmarks/scores.py MODEL [--tokens 8192] [--bits 2 3 4 5 6] [--assignments 24]

Scores are taken on the shipped corpus' calibration half, KL on sequences held out from it.
"""

from __future__ import annotations

import argparse
import random
import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

    from mlxq.methods.formats import Format


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6])
    parser.add_argument("--assignments", type=int, default=24)
    arguments = parser.parse_args()

    from mlxq.machine.blas import load_blas

    load_blas()
    import numpy as np

    from mlxq.budget.scoring import allowed_formats
    from mlxq.calibration.measured import measured_divergences
    from mlxq.calibration.sensitivity import scores
    from mlxq.calibration.streamed import streamed_model
    from mlxq.calibration.tokens import calibration_text
    from mlxq.methods.affine_fit import affine_fit
    from mlxq.methods.formats import Format
    from mlxq.pipeline import prepare
    from mlxq.recipe.load import budget_recipe
    from mlxq.sources.resolve import resolve

    def encoded(path: str, weight: mx.array, fmt: Format, *_: Any) -> mx.array:
        return fmt.decode(affine_fit(weight, fmt).arrays())

    recipe = budget_recipe({"bpw": 4.5}, [f"calibration={{tokens: {arguments.tokens}}}"])
    draft = prepare(recipe, resolve(arguments.model))
    formats = tuple(Format(bits, 64) for bits in arguments.bits)
    chance = random.Random(0)
    assignments = []
    for _ in range(arguments.assignments):
        # Leaning to many or few bits, so that assignments differ in more than luck.
        weights = [chance.random() ** 2 + 0.02 for _ in formats]
        assignments.append({path: chance.choices(formats, weights)[0] for path in allowed_formats(draft)})
    with streamed_model(draft.source, draft.architecture) as streamed:
        text = calibration_text(draft.recipe.calibration, streamed)
        options = dict.fromkeys(allowed_formats(draft), formats)
        found = {
            (score.path, score.fmt): score.divergence
            for score in scores(streamed.sequence, text.batches, options, encoded, streamed.hold)
        }
        *_, measured = measured_divergences(streamed, text.held_out, assignments, encoded)
    assert isinstance(measured, list)
    predicted = [sum(found[item] for item in assignment.items()) for assignment in assignments]
    actual = [statistics.fmean(sequences) for sequences in measured]
    print("| predicted KL | measured KL |\n|---|---|")
    for pair in sorted(zip(predicted, actual, strict=True)):
        print("| {:.4f} | {:.4f} |".format(*pair))
    ranks = np.argsort(np.argsort(predicted)), np.argsort(np.argsort(actual))
    print(f"\nRank correlation over {len(actual)} assignments: {np.corrcoef(*ranks)[0, 1]:.3f}")


if __name__ == "__main__":
    main()
