"""Monitor of every domain's entropy: level, slope, the band around the base model's level, and alarms.

Sums and counts in, nats per token out. A domain is tested after every `WINDOW` draws of it and at every held-out
evaluation; an alarm is raised only where the whole interval of the level lies outside the band. Test n of a domain spends
error / (2 K n (n + 1)) on each side, which sums to `error` over all K domains however many tests there are (alpha
spending). Rollouts are compared with the same band, which comes from held-out prompts. A domain whose training prompts have
a lower entropy than its held-out ones starts lower in it, which is no news: they must have left the same multiples of the
domain's own first draw, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from polyphony.curricula.intervals import ratio
from polyphony.curricula.monitors import Alarm
from polyphony.curricula.records import mean, nan_of, null_of

Sums = tuple[float, float]
"""Summed token entropy in nats, and the tokens it was summed over."""

WINDOW = 8
"""Draws per test: enough for a variance between draws, few enough to see a collapse while it happens."""
TREND = 32
"""Draws the slope is fitted over."""

Kind = Literal["collapse", "explosion"]
Source = Literal["rollouts", "held out"]
SOURCES: tuple[Source, ...] = ("rollouts", "held out")
"""Tested apart: a policy may have memorised its training prompts and still be uncertain on others."""
SAID: Mapping[Source, str] = {"rollouts": "rollouts", "held out": "held out, items that decide"}
"""As an alarm says it: what is published is of the other held-out items, and differs by noise."""


@dataclass(slots=True)
class Excursion:
    """What one source has shown since its last test inside the band."""

    out: Kind | None = None
    """Set by an alarm until a test's level is inside again: one alarm per excursion."""
    since: int = 0
    """Step of the last test inside."""
    drawn: dict[str, int] = field(default_factory=dict)
    """Prompts of each domain drawn since then."""


@dataclass(slots=True)
class Watch:
    """What is remembered of one domain."""

    base: float = math.nan
    """Nats per token at the first evaluation, of the base model."""
    first: float = math.nan
    """Nats per token of the domain's first draw."""
    tests: int = 0
    window: list[Sums] = field(default_factory=list)
    """Draws since the last test."""
    recent: list[tuple[int, float, float]] = field(default_factory=list)
    """(step, nats, tokens) of the last TREND draws."""
    excursions: dict[Source, Excursion] = field(default_factory=lambda: {name: Excursion() for name in SOURCES})


def place_in_band(level: float, band: tuple[float, float]) -> float:
    """Return where a level lies: 0 at the band's low edge, 1 at its high edge; NaN while either is unknown.

    Example: `place_in_band(0.6, (0.4, 0.8)) == 0.5`
    """
    low, high = band
    return (level - low) / (high - low) if high > low else math.nan


class EntropyMonitor:
    """Watch the token entropy of all domains, trained or only watched.

    Example:
        monitor = EntropyMonitor(domains=("math", "safety"), band=(0.5, 1.5))
        monitor.measure(0, {"math": ([40.0, 60.0], [50, 50]), "safety": ([9.0, 11.0], [50, 50])})   # the base model
        alarms = monitor.observe(1, {"math": (31.0, 100.0)}, drawn={"math": 8})
    """

    def __init__(self, *, domains: Sequence[str], band: tuple[float, float], error: float = 0.05) -> None:
        low, high = band
        if not 0 <= low < 1 < high:
            raise ValueError(f"entropy.band must be multiples low < 1 < high of the base model's entropy, got {band}")
        self.factors = (float(low), float(high))
        self.error = error
        self.watches = {name: Watch() for name in domains}

    def band(self, domain: str) -> tuple[float, float]:
        """Return a domain's band in nats per token; NaN before the base model was measured."""
        base = self.watches[domain].base
        return self.factors[0] * base, self.factors[1] * base

    def observe(self, step: int, sums: Mapping[str, Sums], *, drawn: Mapping[str, int]) -> list[Alarm]:
        """Take in one draw: per domain its summed entropy and tokens, and how many prompts of each were drawn."""
        alarms = []
        for name, watch in self.watches.items():
            for excursion in watch.excursions.values():
                for other, count in drawn.items():
                    excursion.drawn[other] = excursion.drawn.get(other, 0) + count
            nats, tokens = sums.get(name, (0.0, 0.0))
            if not tokens:
                continue
            if math.isnan(watch.first):
                watch.first = nats / tokens
            watch.window.append((nats, tokens))
            watch.recent = [*watch.recent[1 - TREND :], (step, nats, tokens)]
            if len(watch.window) == WINDOW:
                totals, counts = zip(*watch.window, strict=True)
                watch.window = []
                alarms += self._test(name, step, totals, counts, "rollouts")
        return alarms

    def measure(self, step: int, items: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> list[Alarm]:
        """Take in one evaluation: per domain the nats and the tokens of each item. The first one sets the bands."""
        alarms = []
        for name, (totals, counts) in items.items():
            watch = self.watches[name]
            if not math.isnan(watch.base):
                alarms += self._test(name, step, totals, counts, "held out")
            elif sum(counts):
                watch.base = sum(totals) / sum(counts)
        return alarms

    def level(self, domain: str) -> float:
        """Return nats per token over the domain's last WINDOW draws; NaN before its first draw."""
        last = self.watches[domain].recent[-WINDOW:]
        tokens = sum(row[2] for row in last)
        return sum(row[1] for row in last) / tokens if tokens else math.nan

    def slope(self, domain: str) -> float:
        """Return the change of the level per optimizer step over the last TREND draws, by least squares on draws."""
        points = [(step, nats / tokens) for step, nats, tokens in self.watches[domain].recent]
        centre, middle = (mean([p[axis] for p in points]) for axis in (0, 1))
        spread = sum((step - centre) ** 2 for step, _ in points)
        return sum((step - centre) * (level - middle) for step, level in points) / spread if spread else math.nan

    def place(self, domain: str) -> float:
        """Return where the level lies in the band."""
        return place_in_band(self.level(domain), self.band(domain))

    def metrics(self) -> dict[str, dict[str, float]]:
        """Return, per domain that was drawn, its metrics; undefined ones are NaN."""
        return {
            name: {"entropy_slope": self.slope(name), "entropy_place": self.place(name)}
            for name, watch in self.watches.items()
            if watch.recent
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on watching; JSON-able, an unmeasured base as null."""
        return {
            name: {
                "base": null_of(w.base),
                "first": null_of(w.first),
                "looks": w.tests,
                "window": list(w.window),
                "recent": list(w.recent),
                "excursions": {source: asdict(excursion) for source, excursion in w.excursions.items()},
            }
            for name, w in self.watches.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`. Raises ValueError where the domains are not those that were saved."""
        if set(state) != set(self.watches):
            raise ValueError(f"saved entropies are of {sorted(state)}, this run has {sorted(self.watches)}")
        self.watches = {
            name: Watch(
                base=nan_of(saved["base"]),
                first=nan_of(saved.get("first", saved["base"])),  # older versions kept none
                tests=saved["looks"],
                window=[(nats, tokens) for nats, tokens in saved["window"]],
                recent=[(step, nats, tokens) for step, nats, tokens in saved["recent"]],
                excursions={source: Excursion(**saved["excursions"][source]) for source in SOURCES},
            )
            for name in self.watches
            for saved in [state[name]]
        }

    def _test(
        self, name: str, step: int, totals: Sequence[float], counts: Sequence[float], source: Source
    ) -> list[Alarm]:
        watch = self.watches[name]
        if math.isnan(watch.base):
            return []
        watch.tests += 1
        one_sided = self.error / (2 * len(self.watches) * watch.tests * (watch.tests + 1))
        level = ratio(totals, counts, level=1 - 2 * one_sided)
        low, high = self.band(name)
        if source == "rollouts":
            low, high = min(low, self.factors[0] * watch.first), max(high, self.factors[1] * watch.first)
        kind: Kind | None = "collapse" if level.high < low else "explosion" if level.low > high else None
        alarms = []
        excursion = watch.excursions[source]
        if kind is not None and kind != excursion.out:
            edge = low if kind == "collapse" else high
            verb, side = ("fell", "below") if kind == "collapse" else ("rose", "above")
            drawn = _shares(excursion.drawn)
            message = (
                f"entropy ({SAID[source]}) {verb} to {level.mid:.3f} nats a token, {side} {edge:.3f} with "
                f"95 % confidence over all tests; {_cause(excursion.since, drawn)}"
            )
            alarms.append(Alarm(step=step, domain=name, kind=kind, message=message, drawn=drawn))
            excursion.out = kind
        if low <= level.mid <= high:
            excursion.out, excursion.since, excursion.drawn = None, step, {}
        return alarms


def _cause(since: int, drawn: Mapping[str, float]) -> str:
    """Return in words which domains were drawn meanwhile, most first."""
    if not drawn:
        return "nothing was drawn meanwhile"
    most = sorted(drawn.items(), key=lambda pair: -pair[1])[:3]
    return f"since step {since} drawn: " + ", ".join(f"{name} {share:.0%}" for name, share in most)


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items() if count}
