"""Signals that a run learns nothing, or does harm: one list, each with its number and a remedy.

Monitors ring what they watch themselves (entropy, signs of shortcuts, guardrails); `Signals` rings what a run's metrics and
evaluations show. Where a run's own first draws say what is usual in it, they are what a number is held against. Each is
told once when it begins, and may be told again once it has been away for twice `DRAWS` draws, or for an evaluation.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from polyphony.curricula.intervals import paired
from polyphony.curricula.monitors import Alarm
from polyphony.curricula.monitors.entropy import WINDOW
from polyphony.curricula.monitors.signs import COLLAPSED, ENOUGH_COMPLETIONS, ENOUGH_CORRECT, RISEN, SIGNS
from polyphony.curricula.records import Domain, Evaluation, mean
from polyphony.trainer.evaluation.base_kl import mean_kl
from polyphony.trainer.metrics import key

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

    from polyphony.trainer.slots import DrawPlan

logger = logging.getLogger(__name__)

DRAWS = 8
"""Draws in a row: one that is all dead, or one large gradient, is no news."""
FIRST = 4
"""Draws that say what is usual in a run."""
EVALUATIONS = 3
"""Evaluations since the best checkpoint."""
ALIKE = 0.95
"""Share of groups whose completions are all the same; solved prompts with one right answer leave some others."""
CUT, CUT_MORE = 0.5, 0.2
"""Share of completions that are cut, and how much more than in the first draws."""
GROWN = 5.0
"""Norms over the one expected: a step is then scaled to less than a fifth. Healthy runs of the lab reach 2.6."""
KL_STEP = 0.1
"""Nats a token in a step; healthy runs of the lab stay below 0.05, at learning rates of 2e-4 and 5e-4."""
TRL_MAX_GRAD_NORM = 1.0
"""TRL's default, that nobody has chosen for this run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Signal:
    """When a signal begins, and what may help."""

    number: str
    remedy: str


SIGNALS: Mapping[str, Signal] = {
    "all_dead": Signal(
        number=f"no group of {DRAWS} draws in a row has a gradient",
        remedy="all wrong: easier rows, more completions a group, prompts as messages where the policy knows a chat "
        "template, or look whether the reward can be earned at all; all correct: harder rows, or stop; `pool` leaves such "
        "prompts out",
    ),
    "one_prompt": Signal(
        number="a draw holds one prompt",
        remedy="raise per_device_train_batch_size or gradient_accumulation_steps: a step then follows one prompt alone",
    ),
    "alike": Signal(
        number=f"in {ALIKE:.0%} of a domain's groups, over its last {DRAWS} draws, all completions are the same",
        remedy="raise temperature, or go on from an earlier checkpoint with a lower learning_rate; if right, harder rows",
    ),
    "truncation": Signal(
        number=f"over a domain's last {DRAWS} draws {CUT:.0%} of completions are cut, or {100 * CUT_MORE:.0f} points more "
        "than at first",
        remedy="raise max_completion_length, or ask for shorter answers; if they were shorter before, lower learning_rate",
    ),
    "gradient_clipped": Signal(
        number=f"each of {DRAWS} draws in a row has a norm {GROWN:g} times max_grad_norm; where that is TRL's default, of "
        "the run's own first draws if these are larger",
        remedy="lower learning_rate; where max_grad_norm was lowered, raise it",
    ),
    "kl_step": Signal(
        number=f"between two evaluations the distance to the base model grew by {KL_STEP:g} nats a token in a step",
        remedy="lower learning_rate, or set beta",
    ),
    "below_start": Signal(
        number="a domain's held-out score is below its own start with 95 % confidence over all domains and evaluations",
        remedy="train on it, give it a guardrail, lower learning_rate, or set beta",
    ),
    "best_long_ago": Signal(
        number=f"the best checkpoint is {EVALUATIONS} evaluations old, the worst domain now, with 95 % confidence, lower",
        remedy="stop, and take the best checkpoint; or go on from it with a lower learning_rate",
    ),
    "collapse": Signal(
        number=f"a domain's entropy, over {WINDOW} draws or at an evaluation, is below its band with 95 % confidence; of "
        "draws that is below the first one's too",
        remedy="entropy.control: adaptive, a higher epsilon_high, more rows, or a lower learning_rate",
    ),
    "explosion": Signal(
        number=f"a domain's entropy, over {WINDOW} draws or at an evaluation, is above its band with 95 % confidence; of "
        "draws that is above the first one's too",
        remedy="lower learning_rate, or set beta; with an entropy bonus, a smaller one",
    ),
    "entropy_unmeasured": Signal(
        number="a held-out entropy was measured at the baseline and is not now",
        remedy="look at the domain's samples: completions without a token have no entropy",
    ),
    "length_collapse": Signal(
        number=f"the last {ENOUGH_CORRECT} correct answers are shorter than {COLLAPSED:.0%} of the first",
        remedy="read the samples: is the work left out, or only the chatter? `guard` keeps shortcuts from being learned",
    ),
    **{
        sign: Signal(
            number=f"{sign.replace('_', ' ')} in {100 * RISEN:.0f} points more of about {ENOUGH_COMPLETIONS} completions",
            remedy="read the samples, and see that the reward does not pay for it; `guard` keeps it from being learned",
        )
        for sign in SIGNS
    },
    "guardrail": Signal(
        number="a domain has lost more than its guardrail's max_drop, with 95 % confidence over all evaluations",
        remedy="a lower learning_rate, more of this domain, or action: rollback or recover",
    ),
    "recovery": Signal(
        number="a guardrail's recovery is over: the interval of what the domain lost holds zero, or its draws are spent",
        remedy="nothing where it is back; else more draws, by: the other way, or action: rollback",
    ),
}
"""Every kind of alarm, once."""


def warn(alarm: Alarm) -> None:
    """Tell the log of an alarm, with what may help."""
    remedy = SIGNALS[alarm.kind].remedy
    logger.warning("step %d: %s: %s. What may help: %s", alarm.step, alarm.title, alarm.message, remedy)


@dataclass(kw_only=True, slots=True)
class Streak:
    """What is remembered of one signal in one domain; JSON-able by `asdict`."""

    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    """Of the last `DRAWS` draws."""
    is_on: bool = False
    away: int = 0
    """Times that it was looked for in vain since."""

    def add(self, value: float, draws: int) -> None:
        values = [value] * min(draws, DRAWS)
        self.first = [*self.first, *values][:FIRST]
        self.last = [*self.last, *values][-DRAWS:]

    @property
    def usual(self) -> float:
        return mean(self.first)


class Signals:
    """Hold a run's metrics and evaluations, as they come, against the list.

    Example: `Signals(trained=("math",), prompts_per_draw=4).see(1, {"rollout/useful_token_frac": 0.0})` is empty.
    """

    def __init__(
        self,
        *,
        trained: Sequence[str],
        prompts_per_draw: int,
        steps_per_draw: float = 1.0,
        max_grad_norm: float | None = TRL_MAX_GRAD_NORM,
    ) -> None:
        self.trained, self.prompts_per_draw, self.steps_per_draw = tuple(trained), prompts_per_draw, steps_per_draw
        self.max_grad_norm = max_grad_norm
        self._streaks: dict[str, Streak] = {}
        self._step = 0
        """Of the last metrics of a draw."""
        self._moved = (0, 0.0)
        """Step of the last evaluation, and how far the policy was from the base model."""

    @classmethod
    def of(cls, args: GRPOConfig, plan: DrawPlan, domains: Sequence[Domain]) -> Signals:
        """Return those of a run that was planned with TRL's arguments."""
        return cls(
            trained=[domain.name for domain in domains if not domain.is_watch_only],
            prompts_per_draw=plan.prompts_per_draw,
            steps_per_draw=plan.micro_batches_per_draw / plan.micro_batches_per_step,
            max_grad_norm=args.max_grad_norm,
        )

    def see(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Take in one line of metrics; a line without a draw says nothing."""
        useful = metrics.get(key("rollout", "useful_token_frac"))
        if useful is None or step <= self._step:
            return []
        draws = max(1, round((step - self._step) / self.steps_per_draw))
        self._step = step
        found = []
        for kind, domain, value in self._measured(useful, metrics):
            streak = self._streak(kind, domain)
            streak.add(value, draws)
            found += self._turn(step, kind, domain, self._told(kind, streak, metrics), away=2 * DRAWS)
        return found

    def _measured(self, useful: float, metrics: Mapping[str, float]) -> Iterator[tuple[str, str, float]]:
        yield "one_prompt", "", float(self.prompts_per_draw == 1)
        yield "all_dead", "", float(useful == 0)
        if "grad_norm" in metrics and useful:
            yield "gradient_clipped", "", metrics["grad_norm"]
        for name in self.trained:
            for kind, metric in (("truncation", "clipped_ratio"), ("alike", "alike")):
                if (value := metrics.get(key("domain", metric, name))) is not None:
                    yield kind, name, value

    def _told(self, kind: str, streak: Streak, metrics: Mapping[str, float]) -> str:
        """Return what is to be told of a signal, empty while it is not to be seen."""
        if kind == "one_prompt":
            return "each draw holds one prompt" if streak.last[-1] else ""
        if len(streak.last) < DRAWS:
            return ""
        now = mean(streak.last)
        if kind == "all_dead":
            return f"no group of {DRAWS} draws had a gradient; {self._causes(metrics)}" if now == 1 else ""
        if kind == "alike":
            told = f"in {now:.0%} of the groups of {DRAWS} draws all completions are the same"
            return f"{told}, {streak.usual:.0%} at the start" if now >= ALIKE else ""
        if kind == "truncation":
            told = f"{now:.0%} of the completions of {DRAWS} draws were cut, {streak.usual:.0%} at the start"
            return told if now >= min(CUT, streak.usual + CUT_MORE) else ""
        if not self.max_grad_norm:
            return ""
        expected, least = self.max_grad_norm, min(streak.last)
        if expected == TRL_MAX_GRAD_NORM:
            expected = max(expected, statistics.median(streak.first))
        told = f"the gradient's norm was at least {least:.3g} in {DRAWS} draws, max_grad_norm is {self.max_grad_norm:g}"
        return f"{told}; {statistics.median(streak.first):.3g} at the start" if least > GROWN * expected else ""

    def _causes(self, metrics: Mapping[str, float]) -> str:
        """Say why the groups of the last update are dead, each domain alike."""
        causes = ("correct", "wrong", "equal")
        shares = {
            c: [metrics[k] for n in self.trained if (k := key("domain", f"dead_{c}", n)) in metrics] for c in causes
        }
        return "in the last " + ", ".join(f"{mean(of):.0%} all {c}" for c, of in shares.items() if of)

    def after_evaluation(
        self, run: Sequence[Evaluation], kl: Mapping[str, Mapping[str, tuple[float, int]]]
    ) -> list[Alarm]:
        """Take in a run's evaluations, baseline first, and the last one's KL to the base model; all of the half that
        decides."""
        tests, step = len(run) - 1, run[-1].step
        if tests < 1:
            return []
        found = self._turn(step, "kl_step", "", self._moved_far(step, mean_kl(kl, self.trained)))
        found += self._turn(step, "best_long_ago", "", _best_long_ago(run, self.trained))
        for name in run[0].scores:
            found += self._turn(step, "below_start", name, _below_start(run, name))
        for name in run[0].entropy:
            gone = "its held-out entropy was not measured; a scheduler that controls it counts it as inside its band"
            found += self._turn(step, "entropy_unmeasured", name, "" if name in run[-1].entropy else gone)
        return found

    def _moved_far(self, step: int, kl: float) -> str:
        if math.isnan(kl) or step <= self._moved[0]:
            return ""
        (then, before), self._moved = self._moved, (step, kl)
        a_step = (kl - before) / (step - then)
        told = f"from step {then} on the distance to the base model grew by {a_step:.2g} nats a token in each step"
        return f"{told}, to {kl:.2g}" if a_step > KL_STEP else ""

    def _streak(self, kind: str, domain: str) -> Streak:
        return self._streaks.setdefault(f"{kind} {domain}".strip(), Streak())

    def _turn(self, step: int, kind: str, domain: str, told: str, *, away: int = 1) -> list[Alarm]:
        streak = self._streak(kind, domain)
        streak.away = 0 if told else streak.away + 1
        begins, streak.is_on = bool(told) and not streak.is_on, bool(told) or (streak.is_on and streak.away < away)
        return [Alarm(step=step, domain=domain, kind=kind, message=told)] if begins else []

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on; JSON-able."""
        streaks = {name: asdict(streak) for name, streak in self._streaks.items()}
        return {"step": self._step, "moved": list(self._moved), "streaks": streaks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        then, kl = state["moved"]
        self._step, self._moved = state["step"], (then, kl)
        self._streaks = {name: Streak(**streak) for name, streak in state["streaks"].items()}


def _below_start(run: Sequence[Evaluation], name: str, *, error: float = 0.05) -> str:
    """Test a domain against its baseline; evaluation n spends error / (K n (n + 1)) on each of K domains."""
    now, start, tests = run[-1], run[0], len(run) - 1
    one_sided = error / (len(start.scores) * tests * (tests + 1))
    change = paired(now.scores[name], start.scores[name], level=1 - 2 * one_sided)
    told = f"its held-out score was {start.mean_score(name):.3f} at the start and is {now.mean_score(name):.3f}"
    return f"{told} (lower by at least {-change.high:.3f}, with confidence)" if change.is_below_zero else ""


def _best_long_ago(run: Sequence[Evaluation], trained: Sequence[str], *, error: float = 0.05) -> str:
    """Test the domain that is lowest now against the checkpoint whose lowest was highest, which may be any of n: evaluation
    n spends error / (n n (n + 1)) on each."""
    lowest = [min((row.mean_score(name), name) for name in trained) for row in run[1:]] if trained else []
    best, tests = max(range(len(lowest)), key=lambda n: (lowest[n][0], n), default=0), len(lowest)
    if tests - 1 - best < EVALUATIONS:
        return ""
    score, name = lowest[-1]
    then = run[1:][best]
    one_sided = error / (tests * tests * (tests + 1))
    change = paired(run[-1].scores[name], then.scores[name], level=1 - 2 * one_sided)
    told = f"the best checkpoint, step {then.step}, is {tests - 1 - best} evaluations old"
    told += f"; {name} stood at {then.mean_score(name):.3f} there and stands at {score:.3f}"
    return f"{told} (lower by at least {-change.high:.3f}, with confidence)" if change.is_below_zero else ""
