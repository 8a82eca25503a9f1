"""Which format each module gets, so that the whole fits a budget and the scores add up to the least.

A multiple-choice knapsack: one option a module, exact bytes, scores that add. A dynamic programme over bytes,
rounded up to a fine unit, solves it nearly exactly; the Lagrangian relaxation gives a lower bound that no
assignment can beat (Kellerer, Pferschy, Pisinger, "Knapsack Problems", ch. 11) and so an honest optimality gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlxq.errors import BadInputError
from mlxq.methods.formats import Format

# Steps that the bytes between the smallest and the largest assignment are counted in.
RESOLUTION = 20_000


@dataclass(frozen=True)
class Option:
    """A format a module could take: every byte it writes and the divergence expected of it. None: unquantized."""

    fmt: Format | None
    nbytes: int
    divergence: float


@dataclass(frozen=True)
class Allocation:
    """A format for every module. ``bound`` is the least divergence any assignment within the budget can have."""

    formats: Mapping[str, Format | None]
    nbytes: int
    divergence: float
    bound: float

    @property
    def gap(self) -> float:
        """Share by which the divergence exceeds the bound: 0 is proven best."""
        return max(0.0, self.divergence / self.bound - 1) if self.bound > 0 else 0.0


def allocate(modules: Mapping[str, Sequence[Option]], budget: int) -> Allocation:
    """The assignment of least total divergence in at most ``budget`` bytes.

    ``modules`` maps a module's path to its options. Raises BadInputError where even the smallest options exceed
    the budget.
    """
    kept = {path: useful(options) for path, options in modules.items()}
    smallest = sum(options[0].nbytes for options in kept.values())
    if smallest > budget:
        raise BadInputError(
            f"the smallest formats allowed take {smallest:,} bytes, the budget is {budget:,}",
            "raise the budget, add smaller options, or let fewer rules fix formats",
        )
    chosen = _fill(kept, _programme(kept, budget - smallest), budget)
    return Allocation(
        formats={path: chosen[path].fmt for path in modules},
        nbytes=sum(option.nbytes for option in chosen.values()),
        divergence=sum(option.divergence for option in chosen.values()),
        bound=lower_bound(kept, budget),
    )


def useful(options: Sequence[Option]) -> list[Option]:
    """Options by rising bytes, each of less divergence than all smaller ones."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.divergence)):
        if not kept or option.divergence < kept[-1].divergence:
            kept.append(option)
    return kept


def _programme(modules: Mapping[str, Sequence[Option]], slack: int) -> dict[str, Option]:
    """Dynamic programme over the bytes spent beyond each module's smallest option, rounded up to a unit."""
    import numpy as np

    most = sum(options[-1].nbytes - options[0].nbytes for options in modules.values())
    if most <= slack:
        return {path: options[-1] for path, options in modules.items()}
    unit = max(1, slack // RESOLUTION)
    capacity = slack // unit
    best = np.zeros(capacity + 1)
    choices: list[tuple[str, np.ndarray, list[int]]] = []
    for path, options in modules.items():
        costs = [-(-(option.nbytes - options[0].nbytes) // unit) for option in options]
        total = best + options[0].divergence
        choice = np.zeros(capacity + 1, dtype=np.uint8)
        for index, cost in enumerate(costs[1:], start=1):
            if cost > capacity:
                break
            reached = best[: capacity + 1 - cost] + options[index].divergence
            wins = reached < total[cost:]
            total[cost:][wins] = reached[wins]
            choice[cost:][wins] = index
        best = total
        choices.append((path, choice, costs))
    chosen: dict[str, Option] = {}
    left = int(np.argmin(best))
    for path, choice, costs in reversed(choices):
        index = int(choice[left])
        chosen[path] = modules[path][index]
        left -= costs[index]
    return chosen


def _fill(modules: Mapping[str, Sequence[Option]], chosen: dict[str, Option], budget: int) -> dict[str, Option]:
    """Spend what rounding left over: the upgrade that gains most per byte, until none fits."""
    chosen = dict(chosen)
    left = budget - sum(option.nbytes for option in chosen.values())
    while True:
        upgrades = [
            ((now.divergence - option.divergence) / (option.nbytes - now.nbytes), path, option)
            for path, now in chosen.items()
            for option in modules[path]
            if 0 < option.nbytes - now.nbytes <= left and option.divergence < now.divergence
        ]
        if not upgrades:
            return chosen
        _, path, option = max(upgrades, key=lambda upgrade: upgrade[:2])
        left -= option.nbytes - chosen[path].nbytes
        chosen[path] = option


def lower_bound(modules: Mapping[str, Sequence[Option]], budget: int) -> float:
    """Largest value of the Lagrangian dual.

    At a price a byte that is the sum over modules of min(divergence + price * bytes), less price * budget.
    """

    def relaxed(price: float) -> tuple[float, int]:
        picks = [
            min(options, key=lambda o: (o.divergence + price * o.nbytes, o.nbytes)) for options in modules.values()
        ]
        nbytes = sum(option.nbytes for option in picks)
        return sum(option.divergence + price * option.nbytes for option in picks) - price * budget, nbytes

    value, nbytes = relaxed(0.0)
    if nbytes <= budget:
        return value
    low, high = 0.0, 1e-9
    while relaxed(high)[1] > budget:
        low, high = high, high * 4
    best = max(value, relaxed(high)[0])
    # The dual is concave in the price and the bytes fall with it, so halving the interval closes on its top.
    for _ in range(80):
        middle = (low + high) / 2
        value, nbytes = relaxed(middle)
        best = max(best, value)
        low, high = (middle, high) if nbytes > budget else (low, middle)
    return best


def frontier(modules: Mapping[str, Sequence[Option]], budgets: Sequence[int]) -> list[Allocation]:
    """The best allocation at each of ``budgets``, smallest first; budgets below the smallest options are skipped."""
    smallest = sum(min(option.nbytes for option in options) for options in modules.values())
    return [allocate(modules, budget) for budget in sorted(budgets) if budget >= smallest]
