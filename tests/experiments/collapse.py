"""Provoke a collapse of entropy and hold it off: does the alarm come before the damage, and does control prevent it?

    python -m tests.experiments.collapse --out runs/collapse --seeds 1 2 3 4 5
    python -m tests.experiments.collapse --recipe collapse_many --out runs/collapse-many --seeds 2 3 4 5 6

Runs of a recipe by seed: `free`, `held` with `entropy.control: coefficient`, and `all` with `entropy.rows: all` beside it.
`collapse` has sixteen prompts that are learned by heart, which takes entropy; `collapse_many` has eight hundred that are
not. A finished run is not made again, so seeds and arms may be added or taken apart. Prints one line a run and, over seeds,
each arm minus free with a 95 % interval (Student's, paired by seed).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from polyphony.curricula.intervals import Interval
from polyphony.curricula.records import mean
from polyphony.curricula.transfer.forgetting import curves
from tests.experiments.trials import Trials, over_seeds

RECIPES = Path(__file__).parent
ARMS = {
    "free": ("entropy.control=none",),
    "held": ("entropy.control=coefficient",),
    "all": ("entropy.control=coefficient", "entropy.rows=all"),
}
LAST = 40
"""Draws at the end that reward and entropy are averaged over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one run came to."""

    alarm: float
    """Step of the first collapse alarm; NaN where none went off."""
    fall: float
    """Step of the first evaluation that is below the best before it for sure (drawdown's 95 % interval under zero)."""
    entropy: float
    """Of rollouts at the end, in multiples of the base model's."""
    inside: float
    """Share of the draws after the first quarter of the run whose smoothed level (8 draws) is inside the band."""
    reward: float
    """Training reward at the end."""
    score: float
    """Held-out score at the end."""
    passed: float
    """Held-out pass@2 at the end."""
    watched: float
    """Held-out score of the domains that are only watched, at the end; NaN without one."""


def outcome(folder: Path) -> Outcome:
    """Read what a run came to."""
    from polyphony.launch.report.run import read_run

    run = read_run(folder)
    name = run.domains[0]
    band = run.setting("entropy", "band")
    base = run.moments[0].entropy[name]
    levels = run.metrics[f"domain/{name}/entropy"].values
    smooth = [mean(levels[k - 7 : k + 1].tolist()) / base for k in range(max(7, len(levels) // 4), len(levels))]
    fallen = [m.step for m in curves(run.moments, watch_only=()) if m.drawdown[name].high < 0]
    collapsed = [alarm["step"] for alarm in run.alarms if (alarm["domain"], alarm["kind"]) == (name, "collapse")]
    return Outcome(
        alarm=min(collapsed, default=math.nan),
        fall=min(fallen, default=math.nan),
        entropy=mean(levels[-LAST:].tolist()) / base,
        inside=mean([float(band[0] <= level <= band[1]) for level in smooth]),
        reward=mean(run.metrics[f"domain/{name}/reward"].values[-LAST:].tolist()),
        score=run.moments[-1].mean_score(name),
        passed=float(run.metrics[f"heldout/{name}/pass_at_k"].values[-1]),
        watched=mean([run.moments[-1].mean_score(watched) for watched in run.watch_only]),
    )


def summary(out: Path, seeds: Sequence[int], arms: Sequence[str]) -> str:
    """Return every run's line and, over seeds, what each arm came to and what it changed of the free runs."""
    found = {arm: [outcome(out / f"{arm}-{seed}") for seed in seeds] for arm in arms}
    fields = tuple(Outcome.__slots__)
    lines = ["run       " + "".join(f"{field:>9}" for field in fields)]
    for arm, outcomes in found.items():
        for seed, result in zip(seeds, outcomes, strict=True):
            lines.append(f"{arm}-{seed:<5}" + "".join(f"{getattr(result, field):>9.3g}" for field in fields))
    for field in fields[2:]:
        values = {arm: [getattr(o, field) for o in outcomes] for arm, outcomes in found.items()}
        if any(map(math.isnan, values["free"])):
            continue
        for arm in arms:
            words = f"{field:<9}{arm:<5}{_interval(over_seeds(values[arm]))}"
            change = [b - a for a, b in zip(values["free"], values[arm], strict=True)]
            lines.append(words if arm == "free" else f"{words}   minus free {_interval(over_seeds(change))}")
    lead = [o.fall - o.alarm for o in found["free"] if not math.isnan(o.fall + o.alarm)]
    before = sum(step > 0 for step in lead)
    lines.append(
        f"free: alarm before the fall in {before} of {len(seeds)} runs ({len(lead)} had both); steps between: {lead}"
    )
    return "\n".join(lines)


def _interval(found: Interval) -> str:
    return f"{found.mid:.3f} [{found.low:.3f}, {found.high:.3f}]"


def main() -> None:
    """Read the arguments, make the runs that are missing, print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--recipe", choices=("collapse", "collapse_many"), default="collapse")
    parser.add_argument("--out", type=Path, default=Path("runs/collapse"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--arms", choices=[arm for arm in ARMS if arm != "free"], nargs="+", default=["held"])
    arguments = parser.parse_args()
    recipe = RECIPES / f"{arguments.recipe}.yaml"
    trials = Trials(recipe=recipe, arms=ARMS, out=arguments.out, overrides=arguments.overrides)
    arms = ["free", *arguments.arms]
    for seed in arguments.seeds:
        for arm in arms:
            trials.run(arm, seed)
    print(summary(arguments.out, arguments.seeds, arms))


if __name__ == "__main__":
    main()
