"""Sides that take turns, so that what else the machine does strikes all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median

Measure = Callable[[int], float]
"""round number → a figure. Equal rounds must mean equal work on all sides."""


def take_turns(name: str, sides: Mapping[str, Measure], rounds: int) -> dict[str, float]:
    """The median of each side's figures; round 0 warms up and does not count."""
    figures: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        shown = []
        for side, measure in sides.items():
            figure = measure(number)
            shown.append(f"{side} {figure:.2f}")
            if number > 0:
                figures[side].append(figure)
        label = f"round {number}" if number else "warm-up"
        print(f"  {name}, {label}: {', '.join(shown)}", flush=True)
    return {side: median(values) for side, values in figures.items()}
