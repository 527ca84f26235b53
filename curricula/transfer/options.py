"""What to do with many domains: mix them, order them, in groups, or train experts that become one model.

    v(o) = 1/J sum_i score_i after o,      g(o) = v(o) - v(mix),      mix: the joint run, which had as many steps

Of what a probe has measured (`arms`; v over the same held-out items, so that o and mix are paired) every variant of every
option has bounds that hold for all of them at once with 95 % confidence, and so for whichever is recommended because its g
looks best. Where an option
has several variants, methods of merging say, the point between its bounds is cross-fitted: the variant is chosen on some
items and seeds and valued on others. A sequence that was not trained has its prediction, with the bounds of `gains`, and is
not recommended by it: in the fast lab's drawn worlds such predictions did not come true (launch/lab/RESULTS.md). Anything
else that was not measured has no value. J domains, B resamples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np

from polyphony.curricula.intervals import Interval
from polyphony.curricula.records import mean
from polyphony.curricula.transfer.effects import JOINT, Effects, Means, Part, item_variance, label_of
from polyphony.curricula.transfer.gains import FOLDS, around, seed_groups
from polyphony.curricula.transfer.matrix import TransferMatrix

Kind = Literal["mix", "sequence", "groups", "merge", "distil"]
KINDS: tuple[Kind, ...] = ("mix", "sequence", "groups", "merge", "distil")
NOTHING = Interval(0.0, 0.0, 0.0)
PUPIL = 0.5
"""Steps of a pupil relative to those of the joint run; not tuned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One way to get one model of all domains.

    Example: `make_plan(matrix).options[0].kind` is the one that is recommended
    """

    kind: Kind
    how: Mapping[str, Any]
    """What exactly: `stages`, or `method` of a merge with its settings."""
    over_mix: Interval | None
    """Gain in the mean score over training on all domains at once; None where it was not measured."""
    source: Literal["measured", "predicted"] | None
    """Of the gain; `predicted` is a sequence that was not trained, by measured transfer."""
    tokens: int | None
    """Rollout tokens of training so, with its experts; of what was not trained, by the tokens of the probes. None where the
    probe counted none."""
    probes: int | None
    """Rollout tokens that the probes took which recommend it; 0 for mixing."""
    is_shown: bool = False
    """Whether it is shown to be better than mixing."""
    note: str = ""
    """What measures it, where it was not; else why there is nothing to measure."""

    def as_json(self) -> dict[str, Any]:
        """Return it as `polyphony plan --json` has it."""
        return {
            "option": self.kind,
            "how": dict(self.how),
            "over_mix": None if self.over_mix is None else list(self.over_mix),
            "source": self.source,
            "is_shown": self.is_shown,
            "tokens": self.tokens,
            "probes": self.probes,
            "note": self.note,
        }


def ranked(options: Sequence[Option]) -> tuple[Option, ...]:
    """Return the options, best first: what is shown to be better than mixing, mixing, what is not, what is not known."""

    def place(option: Option) -> tuple[int, float]:
        gain = 0.0 if option.over_mix is None else option.over_mix.mid
        if option.is_shown or option.kind == "mix":
            return (1 if option.kind == "mix" else 0), -gain
        return (3 if option.over_mix is None else 2), -gain

    return tuple(sorted(options, key=place))


class Planned(NamedTuple):
    """What is known of sequences before any is trained."""

    order: tuple[str, ...]
    over_joint: Interval | None
    stages: tuple[tuple[str, ...], ...]
    """The groups."""
    has_short_joint: bool
    """Whether a joint run is there that had too little training to compare with."""

    @property
    def wants_joint(self) -> str:
        """What would measure mixing, with which all is compared."""
        return would(anew="probe.joint_arm=true") if self.has_short_joint else would("probe.joint_arm=true")


def weigh(matrix: TransferMatrix, planned: Planned, *, resamples: int, rng: np.random.Generator) -> tuple[Option, ...]:
    """Return all options, ranked; `matrix` holds the half of the items that decides. Nothing for a single domain."""
    if len(matrix.trainable) < 2:
        return ()
    measured = _measured(matrix, resamples=resamples, rng=rng)
    costs = _Costs.of(matrix)
    options = [_option(kind, measured.get(kind), planned, matrix, costs) for kind in KINDS]
    return ranked(options)


def groups(effects: Effects, order: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return stages of domains that do not conflict: two do where either's transfer to the other is below zero with 95 %
    confidence. Those that do keep their order, and each stands in the first stage that this allows.
    """
    high = effects.transfer_interval()[1]
    column = {name: effects.domains.index(name) for name in effects.trained}
    hurts = {(a, b): high[j, column[b]] < 0 for j, a in enumerate(effects.trained) for b in effects.trained if a != b}
    stage: dict[str, int] = {}
    for n, name in enumerate(order):
        before = [stage[other] for other in order[:n] if hurts[name, other] or hurts[other, name]]
        stage[name] = max(before, default=-1) + 1
    return tuple(tuple(d for d in order if stage[d] == n) for n in range(max(stage.values(), default=-1) + 1))


class _Found(NamedTuple):
    """The variant of an option that measured best."""

    arm: Mapping[str, Any]
    over_mix: Interval
    tokens: float | None
    is_shown: bool
    """Whether it is above mixing: with one seed, whose luck no interval knows, nothing is."""


def _measured(matrix: TransferMatrix, *, resamples: int, rng: np.random.Generator) -> dict[str, _Found]:
    """Return the gain over mixing of each kind of arm in the file; nothing without a joint run."""
    arms = {label_of(row): row.arm for row in matrix.arms}
    if not arms or not matrix.joint_arm:
        return {}
    effects, labels = Effects(matrix, with_arms=True), list(arms)
    point = _gains(effects, effects.means(), labels)[0]
    width = _widths(effects, labels, resamples=resamples, rng=rng)
    has_seeds = _between_seeds(effects)[2] > 0
    found = {}
    for kind in dict.fromkeys(arm["kind"] for arm in arms.values()):
        places = [n for n, label in enumerate(labels) if arms[label]["kind"] == kind]
        n = places[int(point[places].argmax())]
        mid = _crossfitted(effects, [labels[n] for n in places]) if len(places) > 1 else point[n]
        spent = _mean([row.tokens for row in matrix.arms if label_of(row) == labels[n]])
        gain = around(mid, point[n] - width[n], point[n] + width[n])
        found[kind] = _Found(arms[labels[n]], gain, spent, gain.is_above_zero and has_seeds)
    return found


def _gains(effects: Effects, means: Means, labels: Sequence[str], seeds: Sequence[int] | None = None) -> np.ndarray:
    """Return the mean score of each variant minus that of the joint run, [B, labels]."""
    columns = [effects.domains.index(name) for name in effects.trained]

    def value(label: str) -> np.ndarray:
        return means.after[:, effects.rows_of(label, seeds)].mean(axis=1)[:, columns].mean(axis=1)

    return np.stack([value(label) for label in labels], axis=1) - value(JOINT)[:, None]


def _widths(effects: Effects, labels: Sequence[str], *, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return half the width of each variant's bounds, [labels]: 95 % for all together.

    As Dunnett's (JASA 50, 1955), who compares several treatments with one control: the largest of correlated t-statistics.
    Their noise is that between seeds, which is known to few degrees of freedom, and of that of items drawn anew what is not
    in it already: an item may be answered otherwise at the next seed.
    """
    between, within, freedom = _between_seeds(effects)
    runs = {label: 1 / len(effects.rows_of(label)) for label in (JOINT, *labels)}
    lucks = {label: rng.normal(scale=np.sqrt(between * share), size=resamples) for label, share in runs.items()}
    items = _gains(effects, effects.resample(resamples, rng=rng), labels)
    items -= items.mean(axis=0)
    known = within * np.array([runs[label] + runs[JOINT] for label in labels])
    variance = items.var(axis=0)
    items *= np.sqrt(np.maximum(0.0, 1 - np.divide(known, variance, out=np.ones_like(known), where=variance > 0)))
    noise = items + np.stack([lucks[label] - lucks[JOINT] for label in labels], axis=1)
    spread = noise.std(axis=0)
    statistics = np.divide(np.abs(noise), spread, out=np.zeros_like(noise), where=spread > 0).max(axis=1)
    if freedom:
        statistics /= np.sqrt(rng.chisquare(freedom, resamples) / freedom)
    return np.quantile(statistics, 0.95) * spread


def _between_seeds(effects: Effects) -> tuple[float, float, int]:
    """Return the variance, between seeds, of the mean score after a training, pooled over all trainings; the part of it that
    items alone explain; and its degrees of freedom, 0 where each was done once.
    """
    columns = [effects.domains.index(name) for name in effects.trained]
    squares, of_items, freedom = 0.0, 0.0, 0
    for label in dict.fromkeys(effects.labels):
        rows = effects.rows_of(label)
        if len(rows) < 2:
            continue
        changes = [effects.after[k][rows] - effects.before[k][rows] for k in columns]
        means = np.mean([each.mean(axis=1) for each in changes], axis=0)
        squares += float(((means - means.mean()) ** 2).sum())
        of_items += sum(map(item_variance, changes)) / len(columns) ** 2
        freedom += len(rows) - 1
    return squares / max(freedom, 1), of_items / max(freedom, 1), freedom


def _crossfitted(effects: Effects, labels: Sequence[str]) -> float:
    """Return the gain of the best of some variants, each chosen on items and seeds on which it is not valued."""
    folds = min(FOLDS, *(items.shape[1] for items in effects.after))
    if folds < 2:
        return np.nan
    seeds = seed_groups(effects)
    values = []
    for fold, n in product(range(folds), range(len(seeds))):
        chosen = _gains(effects, effects.means(Part(fold, folds, rest=True)), labels, seeds[n])[0].argmax()
        rest = _gains(effects, effects.means(Part(fold, folds, rest=False)), labels, seeds[-1 - n])
        values.append(rest[0, chosen])
    return float(np.mean(values))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Costs:
    """Rollout tokens, means over seeds; None where they were not counted."""

    alone: float | None
    """Of one run of each domain alone, together."""
    joint: float | None
    """Of the joint run, or what it would take."""
    probes: int | None
    """Of all runs in the file, without their evaluations and placebos."""

    @classmethod
    def of(cls, matrix: TransferMatrix) -> _Costs:
        by_name = [_mean([r.tokens for r in matrix.probes if r.trained == (name,)]) for name in matrix.trainable]
        alone = None if None in by_name else sum(n for n in by_name if n is not None)
        rows = [row.tokens for row in (*matrix.probes, *matrix.joint_arm, *matrix.arms)]
        probes = None if None in rows else sum(n for n in rows if n is not None)
        return cls(alone=alone, joint=_mean([r.tokens for r in matrix.joint_arm]) or alone, probes=probes)

    def training(self, kind: Kind, own: float | None) -> int | None:
        """Return what an option takes; `own` is what its measured training took."""
        if kind in ("mix", "sequence", "groups"):
            total = own if own is not None else self.joint if kind == "mix" else self.alone
        elif kind == "merge" or self.alone is None:
            total = self.alone
        else:
            pupil = own if own is not None else None if self.joint is None else PUPIL * self.joint
            total = None if pupil is None else self.alone + pupil
        return None if total is None else round(total)


def _mean(counts: Sequence[int | None]) -> float | None:
    known = [n for n in counts if n is not None]
    return mean(known) if known and len(known) == len(counts) else None


def _option(kind: Kind, found: _Found | None, planned: Planned, matrix: TransferMatrix, costs: _Costs) -> Option:
    """Return one option: by its measured arm, by what is predicted of a sequence, or as one that is not known."""
    tokens = costs.training(kind, found.tokens if found else None)
    plain = Option(kind=kind, how={}, over_mix=None, source=None, tokens=tokens, probes=costs.probes)
    if found is not None:
        how = {key: value for key, value in found.arm.items() if key != "kind"}
        return replace(plain, how=how, over_mix=found.over_mix, source="measured", is_shown=found.is_shown)
    if kind == "mix":
        is_known = bool(matrix.joint_arm)
        note = "" if is_known else planned.wants_joint
        gain, source = (NOTHING, "measured") if is_known else (None, None)
        return replace(plain, over_mix=gain, source=source, probes=0, note=note)
    if kind == "sequence":
        note = planned.wants_joint if planned.over_joint is None else would("probe.ways=[sequence]")
        how = {"stages": [[name] for name in planned.order]}
        known = {"over_mix": planned.over_joint, "source": None if planned.over_joint is None else "predicted"}
        return replace(plain, how=how, note=note, **known)
    if any(row.arm["kind"] == kind for row in matrix.arms):  # it was trained, and has nothing to be compared with
        return replace(plain, note=planned.wants_joint)
    if kind == "groups":
        stages = planned.stages
        if len(stages) == 1 or len(stages) == len(planned.order):
            what = "no two domains conflict: it would be mixing" if len(stages) == 1 else "it would be the sequence"
            return replace(plain, note=what)
        return replace(plain, how={"stages": [list(stage) for stage in stages]}, note=would("probe.ways=[groups]"))
    has_weights = matrix.provenance.get("probe", {}).get("keep") is not None
    if kind == "merge":
        return replace(plain, note=would("probe.merge=[linear,ties]", anew="" if has_weights else "probe.keep=last"))
    return replace(plain, note=would("probe.ways=[distil]", anew="" if has_weights else "probe.keep=last"))


RECIPE, FOLDER = "RECIPE", "FOLDER"
"""In a note, what stands for the probe's recipe and its folder where these are not known."""


MEASURES_ORDER = "`polyphony probe` with probe.ways=[sequence] would measure it"
"""What a plan says of an order that was not trained."""


def would(override: str = "", *, anew: str = "") -> str:
    """Return what measures an option, for all that is not measured yet; `anew`: what was needed from the start and was not
    there.
    """
    words = ["polyphony probe", RECIPE, anew, override, "--out", "ANOTHER" if anew else FOLDER]
    return f"not measured: `{' '.join(word for word in words if word)}` would"


def as_recipe(option: Option) -> str:
    """Return what makes a recipe do a sequence or groups; empty for the others."""
    stages = option.how.get("stages")
    if stages is None:
        return ""
    order = [stage[0] if len(stage) == 1 else list(stage) for stage in stages]
    return f"curriculum={{scheduler: sequential, order: {json.dumps(order)}}}"
