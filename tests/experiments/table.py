"""The lab's domain that acts, trained and held out, beside a control whose tool answers from other rows' tables.

    python -m tests.experiments.table --out runs/table --seeds 1 2 3 4 5

`asks` trains the policy of `launch/lab/table_policy` on questions that its tool can answer; `shuffled` does everything
alike, but what the tool answers has nothing to do with the question, in training and at evaluations; that run also watches
`asked`, the questions with the right tool. Prints each seed's held-out scores at the base and at the end, all items, and the
difference with its interval, paired by item; skills apart, so one call and two; over seeds means with 95 % t-intervals.
Holds `asks` to `LEAST` and to `TIMES` its base, `shuffled` to no difference. Runs that are there are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from polyphony.curricula.intervals import Interval, changed
from polyphony.curricula.records import graded, mean
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.trainer.run.folder import RunFolder
from tests.experiments.trials import Trials, over_seeds

RECIPE = Path(__file__).parent / "table.yaml"
TABLE = "polyphony.launch.lab.table:Table"
ARMS = {
    "asks": (),
    "shuffled": (
        f"domains.table.environment={{name: '{TABLE}', shuffled: true}}",
        f"domains.asked={{kind: structured, environment: '{TABLE}', reward: exact, "
        f"heldout: {{environment: '{TABLE}', count: 400, seed: 2}}}}",
    ),
}
LEAST, TIMES = 0.6, 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ends:
    """What a run's held-out items of a domain scored at its first and its last evaluation; by skill their means."""

    base: Sequence[float | None]
    last: Sequence[float | None]
    skills: dict[str, tuple[float, float]]

    @classmethod
    def of(cls, folder: Path, domain: str) -> Ends:
        """Read them of a finished run."""
        rows = TransferMatrix.load(RunFolder(folder).transfer).rows
        told = [line for line in RunFolder(folder).read("metrics") if f"heldout/{domain}/score" in line]
        names = sorted(k.split("/")[2] for k in told[0] if k.startswith(f"skill/{domain}/") and k.endswith("/score"))
        of = {n: (told[0][f"skill/{domain}/{n}/score"], told[-1][f"skill/{domain}/{n}/score"]) for n in names}
        return cls(base=rows[0].scores[domain], last=rows[-1].scores[domain], skills=of)

    @property
    def means(self) -> tuple[float, float]:
        """The mean at the base and at the end."""
        return mean(graded(self.base)), mean(graded(self.last))

    @property
    def change(self) -> Interval:
        """The difference, with its interval over items."""
        return changed(self.last, self.base)


def summary(found: Mapping[str, Sequence[Ends]], seeds: Sequence[int]) -> str:
    """Return the table of every seed, the intervals over seeds, and whether they are what they are held to."""
    lines = [
        "| arm | seed | base | end | difference (over items) | by skill, `report` half |",
        "|---|---|---|---|---|---|",
    ]
    for arm, ends in found.items():
        for seed, one in zip(seeds, ends, strict=True):
            base, last = one.means
            skills = ", ".join(f"{name} {a:.2f} → {b:.2f}" for name, (a, b) in one.skills.items())
            lines.append(f"| {arm} | {seed} | {base:.3f} | {last:.3f} | {_told(one.change)} | {skills} |")
    lines.append("")
    for arm, ends in found.items():
        last, by = over_seeds([e.means[1] for e in ends]), over_seeds([e.means[1] - e.means[0] for e in ends])
        lines.append(f"{arm}: end {_told(last, sign='')}, end minus base {_told(by)}, {len(seeds)} seeds")
    asks, shuffled = found["asks"], found["shuffled"]
    base, last = mean([e.means[0] for e in asks]), mean([e.means[1] for e in asks])
    is_apart = [one.change.is_above_zero or one.change.is_below_zero for one in shuffled]
    lines += [
        f"asks: {last:.3f}, held to {LEAST:g} and to {TIMES:g} x {base:.3f}: "
        + ("met" if last >= max(LEAST, TIMES * base) else "MISSED"),
        f"shuffled: {sum(is_apart)} of {len(is_apart)} runs outside their interval of the base",
    ]
    return "\n".join(lines)


def _told(interval: Interval, *, sign: str = "+") -> str:
    return f"{interval.mid:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def compare(out: Path, seeds: Sequence[int], overrides: Sequence[str] = ()) -> str:
    """Run what is missing in `out`; return it in words."""
    trials = Trials(recipe=RECIPE, arms=ARMS, out=out, overrides=overrides)
    runs = {(arm, seed): trials.run(arm, seed) for arm in ARMS for seed in seeds}
    found = {arm: [Ends.of(runs[arm, seed], "table") for seed in seeds] for arm in ARMS}
    return summary(found | {"shuffled, asked": [Ends.of(runs["shuffled", seed], "asked") for seed in seeds]}, seeds)


def main() -> None:
    """Read the arguments, run what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="change the recipe of all arms")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    arguments = parser.parse_args()
    print(compare(arguments.out, arguments.seeds, arguments.overrides))


if __name__ == "__main__":
    main()
