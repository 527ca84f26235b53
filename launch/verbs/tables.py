"""What the command prints of a transfer matrix, for a terminal of 100 columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polyphony.curricula.intervals import UNDEFINED, Interval
from polyphony.curricula.transfer.effects import Effects
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.curricula.transfer.options import Option, as_recipe


def transfer_table(matrix: TransferMatrix) -> str:
    """Return T[j -> i] as text: a row for each domain trained on, a column for each domain measured.

    Each cell is the change of the mean score with half the width of its 95 % interval; `*` where it excludes zero. With
    placebo runs, the change beyond theirs, and below it theirs.
    """
    if matrix.placebo:
        told = ["beyond shuffled rewards:", _transfer(Effects(matrix, against="placebo"))]
        return "\n".join([*told, "shuffled rewards by themselves:", _transfer(Effects(matrix.of_placebo()))])
    return _transfer(Effects(matrix))


def _transfer(effects: Effects) -> str:
    table, (low, high) = effects.transfer(), effects.transfer_interval()
    width = max(14, *(len(name) + 2 for name in effects.domains))
    lines = ["training on".ljust(14) + "".join(f"{'→ ' + name:>{width}}" for name in effects.domains)]
    for j, name in enumerate(effects.trained):
        cells = [_cell(table[j, i], low[j, i], high[j, i]) for i in range(len(effects.domains))]
        lines.append(f"{name:<14}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def options_table(options: Sequence[Option]) -> str:
    """Return the options, the recommended one first: gain over mixing, tokens, and how, or what would measure it."""
    lines = [f"{'option':<10}{'over mixing, 95 %':<30}{'rollout tokens':<32}how"]
    for n, option in enumerate(options):
        gain = "not known" if option.over_mix is None else "{1:+.3f} ({0:+.3f} to {2:+.3f})".format(*option.over_mix)
        gain = "-" if option.kind == "mix" and option.over_mix else gain
        how = as_recipe(option) or ", ".join(f"{key} {value}" for key, value in option.how.items())
        told = [how, option.source or "", option.note, "recommended" if n == 0 else ""]
        cost = "not counted" if option.tokens is None else f"{option.tokens / 1e6:.3g} M"
        cost += f", probes {option.probes / 1e6:.3g} M" if option.probes else ""
        lines.append(f"{option.kind:<10}{gain:<30}{cost:<32}{'; '.join(part for part in told if part)}")
    return "\n".join(lines)


def predicted_table(reviews: Sequence[Mapping[str, Any]]) -> str:
    """Return what a planned run expected after each stage beside what was measured (`steer` half, which decides)."""
    names = list(reviews[0].get("predicted", {}))
    width = max(15, *(len(name) + 2 for name in names)) if names else 15
    lines = ["after stage".ljust(14) + "".join(f"{name:>{width}}" for name in names) + "   predicted / measured"]
    for review in reviews:
        pairs = [(review["predicted"][n], review["measured"][n]) for n in names if "predicted" in review]
        lines.append(f"{review['stage']:<14}" + "".join(f"{f'{p:.2f} / {m:.2f}':>{width}}" for p, m in pairs))
    return "\n".join(lines)


def statistics_table(found: Mapping[str, Mapping[str, Interval]]) -> str:
    """Return statistics (rows) of domains (columns) with their 95 % intervals."""
    return _columns(found, lambda i: f"{i.mid:.3f} [{i.low:.3f}, {i.high:.3f}]")


def changes_table(found: Mapping[str, Mapping[str, Interval]]) -> str:
    """Return changes of statistics with their 95 % intervals; `*` marks those whose interval excludes zero."""
    return _columns(
        found,
        lambda i: f"{i.mid:+.3f} [{i.low:+.3f}, {i.high:+.3f}]{'*' if i.is_above_zero or i.is_below_zero else ' '}",
    )


ACROSS = 4
"""Domains side by side."""


def _columns(found: Mapping[str, Mapping[str, Interval]], write: Callable[[Interval], str]) -> str:
    blocks, names = [], list(found)
    for start in range(0, len(names), ACROSS):
        shown = names[start : start + ACROSS]
        width = max(24, *(len(name) + 2 for name in shown))
        lines = [" " * 27 + "".join(f"{name:>{width}}" for name in shown)]
        for statistic in dict.fromkeys(statistic for name in shown for statistic in found[name]):
            known = [found[name].get(statistic, UNDEFINED) for name in shown]
            cells = ["-" if math.isnan(i.mid) else write(i) for i in known]
            lines.append(f"{statistic:<27}" + "".join(f"{cell:>{width}}" for cell in cells))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _cell(change: float, low: float, high: float) -> str:
    if math.isnan(change):
        return "-"
    mark = "*" if low > 0 or high < 0 else " "
    return f"{change:+.3f}±{(high - low) / 2:.3f}{mark}"
