"""Every metric name of ours, once; and sums and counts over draws, divided once when they are logged.

TRL's own keys stay as they are; ours stand beside them: `domain/<d>/<metric>`, `curriculum/<d>/<metric>`,
`heldout/<d>/<metric>`, `diversity/<d>/<metric>`, `distil/<d>/<metric>`, `environment/<d>/<metric>`,
`recovery/<d>/<metric>`, `shortcuts/<d>/<metric>`, `skill/<d>/<skill>/<metric>`, `transfer/<d>/<metric>`, `rollout/<metric>`
and `faults/<metric>`. What a
reward logs under a name of its own is `domain/<d>/logged/<name>` and `heldout/<d>/logged/<name>`. Undefined values are
absent, never 0. To add one: its name and meaning here, then its value where it is known: `Meter` for `domain/..`,
`run/recorder.py` for `heldout/..` and `transfer/..`, the owner's `metrics` or `flush` for the others.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from polyphony.curricula.records import Group, passed
from polyphony.trainer.environments.counts import EpisodeSums

METRICS: Mapping[str, Mapping[str, str]] = {
    "domain": {
        "reward": "mean reward over graded completions since the last log",
        "reward_std": "standard deviation of those rewards",
        "entropy": "mean token entropy of the policy in nats at the run's temperature, over all completions sampled",
        "entropy_unmeasured": "completions of replaced groups without an entropy, because `grpo.top_p` or its like is set",
        "entropy_slope": "change of that entropy per optimizer step over the domain's last 32 draws",
        "entropy_place": "mean in training of the last 8 draws relative to the band: 0 at its low edge, 1 at its high edge",
        "entropy_coef": "coefficient of the domain's entropy term in the loss, with `entropy.control`",
        "pass_rate": "share of graded completions with reward 1",
        "frac_dead": "share of dead groups, without a gradient: rewards all equal (`algorithm: rft`: none accepted)",
        "dead_completions": "share of completions in dead groups",
        "dead_correct": "share of the groups in the update that are dead because every completion is correct",
        "dead_wrong": "share of them that are dead because every completion is wrong",
        "dead_equal": "share of them that are dead because all have the same partial reward",
        "alike": "share of groups whose completions are all the same, token by token",
        "mean_length": "mean tokens per completion",
        "clipped_ratio": "share of completions cut at the length limit",
        "grader_failures": "completions whose reward raised an error or returned None",
        "exhausted": "share of graded completions that ran into a limit of their grader; they count as wrong",
        "suspected_tricks": "share whose program passes its tests whatever they expect; their reward is 0",
        "refused_calls": "share whose program made a system call that the sandbox does not list",
        "judge_tokens": "tokens that the judge read and wrote per completion",
        "n": "completions sampled",
    },
    "curriculum": {
        "mixture": "the domain's probability in the last draw, as the scheduler set it",
        "active": "prompts whose pass rate lies in the band that is trained on (with `pool`)",
        "deferred": "prompts below the band, retried on schedule",
        "impossible": "prompts whose pass rate is below `pool.impossible_below` with 95 % confidence",
        "mastered": "prompts above the band, reviewed on schedule",
    },
    "distil": {
        "kl": "mean over tokens of log pi - log pi_teacher in nats, with `algorithm: distil` or a guardrail's `by: "
        "distil`: KL(policy || teacher) on the policy's completions",
        "advantage": "mean advantage of a token as it is learned from, over the tokens that the teacher scored",
        "clipped": "share of those tokens whose advantage is cut at `distil.clip`",
        "missing": "completions on which the teacher's log-probabilities are no numbers: they have no advantage",
        "factor": "what the domain's advantages are multiplied with, so that its tokens weigh its share of the completions; "
        "with a teacher, or where it is not 1",
    },
    "recovery": {
        "draws": "draws that recoveries of the domain have taken so far (`guardrails.<d>.action: recover`)",
        "change": "held-out score now minus the one that it is to regain, `steer` half; at evaluations in a recovery",
        "change_low": "lower end of its 95 % interval, paired by item",
        "change_high": "upper end of it: the domain is regained where it is not below 0",
    },
    "shortcuts": {
        "answer_repetition": "share of completions that state their answer three times or more",
        "repeated_ngrams": "share with more than 30 % repeated 8-grams",
        "computation_skipping": "share far shorter than the domain's correct completions, or without the solution's steps",
        "bare_answer": "share with an answer and hardly anything before it",
        "language_mixing": "share with more than 5 % of the letters in other scripts than Latin and Greek",
        "truncation": "share cut at the length limit",
        "rare_successes": "correct completions of groups in which at most one, or a quarter, are correct",
        "suspects": "correct completions with a sign that is not in the reference style; rare ones until it is learned",
        "correct_length": "median tokens of the last 64 correct completions",
    },
    "heldout": {
        "score": "mean held-out score in [0, 1], `report` half",
        "score_low": "lower end of its 95 % interval, over items",
        "score_high": "upper end of it",
        "entropy": "mean token entropy on held-out completions in nats",
        "entropy_place": "that relative to the band around the first evaluation's, as `domain/<d>/entropy_place`",
        "entropy_low": "low edge of that band, in nats",
        "entropy_high": "high edge of it",
        "pass_at_k": "share of held-out items (`report` half) with a full score in any of the k samples",
        "grader_failures": "held-out samples whose grading failed, all items: left out of scores, not correct in pass_at_k",
        "exhausted": "share of held-out samples that ran into a limit of their grader, `report` half",
        "suspected_tricks": "share whose program passes its tests whatever they expect, `report` half",
        "refused_calls": "share whose program made a system call that the sandbox does not list, `report` half",
        "judge_tokens": "tokens that the judge read and wrote per sample, `report` half",
        "majority": "score of the majority vote over an item's samples, ties shared",
        "greedy": "score of greedy decoding, with `eval.greedy`",
        "format_valid": "share of samples that are finished, not empty, and in the format their grader asks for",
        "format_share": "share of the most frequent output style",
        "ece": "expected calibration error of the answers' token probabilities, ten bins of equal mass",
        "brier": "Brier score: mean squared difference of that probability and correctness",
        "auroc": "area under the ROC curve of that probability as a predictor of correctness",
        "overconfidence": "mean of that probability minus the share of correct answers",
        "kl_base": "KL(base || policy) in nats per token, on the base model's completions of held-out prompts",
        "kl_current": "mean of kl_base over the domains trained since the last evaluation",
        "kl_others": "mean of kl_base over all other domains",
        "distinct_2": "distinct-2: distinct over all word bigrams in an item's samples",
        "self_bleu": "self-BLEU: mean BLEU of each sample against the item's others, 1 where all are equal",
        "vendi": "Vendi score: effective number of different samples of an item, by shared words",
        "unique_correct": "number of semantically different answers among an item's correct samples",
        "classes": "number of semantically different answers of an item, in domains with a diversity reward",
    },
    "diversity": {
        "classes": "number of semantically different answers in a group, in domains with a diversity reward",
        "mean": "mean difference of an answer from the others of its group, in [0, 1], after the floor",
        "collapsed": "share of groups whose answers all say the same",
        "reward": "mean of the fused reward that advantages are computed from; quality alone is domain/<d>/reward",
        "failures": "groups whose partitioner failed: their completions have no reward",
    },
    "environment": {
        "turns": "turns of the policy per completion, in domains with `environment` or `tools`",
        "calls": "calls of tools per completion",
        "unknown_tools": "share of the calls that name no tool",
        "bad_arguments": "share of them with arguments that the tool does not take",
        "raised": "share of them in which the tool raised an error",
        "bad_results": "share of them that were answered by something else than text",
        "malformed_calls": "share of turns that cannot be read as calls, of these and the calls; they are text, as in TRL",
        "cut_by_turns": "share of completions that `grpo.max_tool_calling_iterations` ended while they called tools",
        "cut_by_length": "share that ended at the limit of tokens, in a turn or as what was said to them did not fit",
        "forfeits": "completions with reward 0 because a call did not come back, or took its process down",
        "faults": "completions without a reward because their environment failed, by no call's doing",
        "entropy_turn_1": "mean token entropy of the policy in its first turn in nats, over the groups of the update",
        "entropy_turn_2": "the same of second turns",
        "entropy_turn_3": "of third turns",
        "entropy_turn_4": "of fourth and all later turns",
        "reward_turns_1": "mean reward of completions of one turn",
        "reward_turns_2": "of those of two turns",
        "reward_turns_3": "of three turns",
        "reward_turns_4": "of four and more turns",
    },
    "skill": {
        "reward": "`domain/<d>/reward` of the rows with one `skill` (a column); `<d>` is domain/skill here",
        "entropy": "`domain/<d>/entropy` of them",
        "n": "completions sampled of them",
        "score": "mean held-out score of such items in [0, 1], `report` half",
        "heldout_entropy": "mean token entropy on their held-out completions in nats",
    },
    "transfer": {
        "bwt": "backward transfer: score now minus score at the end of its last stage (watch-only: minus "
        "the baseline); `transfer/bwt`: mean over domains",
        "bwt_low": "lower end of its 95 % interval, paired by item",
        "bwt_high": "upper end of it",
        "fwt": "forward transfer: score before the domain's first stage minus the baseline",
        "drawdown": "score now minus the cross-fitted best score so far",
        "drawdown_low": "lower end of its 95 % interval",
        "drawdown_high": "upper end of it",
        "drawdown_max": "largest drawdown of any domain, as a positive number",
    },
    "rollout": {
        "tokens_per_s": "generated tokens per second of generation",
        "refill_rounds": "rounds per draw in which dead groups were replaced",
        "shortfall": "dead groups per draw left after refill",
        "useful_token_frac": "share of generated tokens in groups with a gradient",
        "behind": "optimizer steps that the weights of a draw's completions were behind, with `rollouts.ahead`",
        "wait_s": "seconds per draw that training waited for completions, with `rollouts.ahead`",
        "dropped": "draws that had been generated ahead and were dropped, as weights went back to a checkpoint",
    },
    "faults": {
        "skipped_steps": "optimizer steps skipped because loss or gradient was not finite",
        "workers_restarted": "rollout workers that were lost or hung, and replaced",
        "regenerated": "completions sampled again because their worker was lost",
        "stale": "completions of an older weight version, refused or importance-corrected",
    },
}

OF_THE_RUN = frozenset(
    {
        *("heldout/kl_current", "heldout/kl_others", "transfer/drawdown_max"),
        *(f"{family}/{metric}" for family in ("rollout", "faults") for metric in METRICS[family]),
    }
)
"""Keys of the run as a whole: they have no domain in them. `transfer/bwt` stands with and without."""


def key(family: str, metric: str, domain: str | None = None) -> str:
    """Return the full name of a metric. Raises KeyError for one that METRICS does not list."""
    METRICS[family][metric]
    return f"{family}/{metric}" if domain is None else f"{family}/{domain}/{metric}"


def defined(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Return the metrics that have a finite value: JSON knows neither NaN nor infinity."""
    return {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}


@dataclass(slots=True)
class DomainSums:
    """Running sums of one domain between two logs."""

    groups: int = 0
    dead: int = 0
    dead_completions: int = 0
    alike: int = 0
    updated: int = 0
    dead_correct: int = 0
    dead_wrong: int = 0
    dead_equal: int = 0
    completions: int = 0
    failures: int = 0
    graded: int = 0
    passed: int = 0
    reward: float = 0.0
    reward_squared: float = 0.0
    tokens: int = 0
    useful_tokens: int = 0
    truncated: int = 0
    entropy: float = 0.0
    entropy_tokens: float = 0.0
    entropy_unmeasured: int = 0

    @classmethod
    def of(cls, group: Group, *, is_useful: bool) -> DomainSums:
        graded, size, tokens = group.unselected, len(group.rewards), sum(group.lengths)
        return cls(
            groups=1,
            dead=int(not is_useful),
            dead_completions=0 if is_useful else size,
            alike=int(group.is_alike),
            completions=size,
            failures=size - len(group.graded),
            graded=len(graded),
            passed=len(passed(graded)),
            reward=sum(graded),
            reward_squared=sum(r * r for r in graded),
            tokens=tokens,
            useful_tokens=tokens if is_useful else 0,
            truncated=sum(group.truncated),
        )

    def add(self, other: DomainSums) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def update_with(self, group: Group, *, is_useful: bool) -> None:
        """Count a group that went on to the update."""
        self.updated += 1
        if not is_useful:
            self.dead_correct += group.cause == "all_correct"
            self.dead_wrong += group.cause == "all_wrong"
            self.dead_equal += group.cause == "all_equal"

    def metrics(self) -> dict[str, float]:
        """Return the `domain/<d>` metrics; NaN where nothing was counted."""
        mean = _ratio(self.reward, self.graded)
        variance = _ratio(self.reward_squared - self.graded * mean**2, self.graded - 1) if self.graded > 1 else math.nan
        return {
            "reward": mean,
            "reward_std": math.sqrt(max(0.0, variance)) if not math.isnan(variance) else math.nan,
            "entropy": _ratio(self.entropy, self.entropy_tokens),
            "entropy_unmeasured": self.entropy_unmeasured or math.nan,
            "pass_rate": _ratio(self.passed, self.graded),
            "frac_dead": _ratio(self.dead, self.groups),
            "dead_completions": _ratio(self.dead_completions, self.completions),
            "dead_correct": _ratio(self.dead_correct, self.updated),
            "dead_wrong": _ratio(self.dead_wrong, self.updated),
            "dead_equal": _ratio(self.dead_equal, self.updated),
            "alike": _ratio(self.alike, self.groups),
            "mean_length": _ratio(self.tokens, self.completions),
            "clipped_ratio": _ratio(self.truncated, self.completions),
            "grader_failures": self.failures,
            "n": self.completions,
        }


@dataclass(slots=True)
class DiversitySums:
    """Running sums of one domain's diversity reward between two logs."""

    groups: int = 0
    """Compared by the partitioner."""
    failures: int = 0
    classes: int = 0
    collapsed: int = 0
    completions: int = 0
    diversity: float = 0.0
    learned: int = 0
    fused: float = 0.0

    def add(self, group: Group) -> None:
        assert group.fused is not None
        fused = group.fused
        if fused.classes is None or fused.diversity is None:
            self.failures += 1
            return
        self.groups += 1
        self.classes += len(set(fused.classes))
        self.collapsed += len(fused.classes) > 1 and len(set(fused.classes)) == 1
        self.completions += len(fused.diversity)
        self.diversity += sum(fused.diversity)
        known = [r for r in fused.rewards if r is not None]
        self.learned += len(known)
        self.fused += sum(known)

    def metrics(self) -> dict[str, float]:
        """Return the `diversity/<d>` metrics; NaN where nothing was counted."""
        return {
            "classes": _ratio(self.classes, self.groups),
            "mean": _ratio(self.diversity, self.completions),
            "collapsed": _ratio(self.collapsed, self.groups),
            "reward": _ratio(self.fused, self.learned),
            "failures": self.failures,
        }


OF_GRADERS = ("exhausted", "suspected_tricks", "refused_calls", "judge_tokens")
"""What our graders say of each completion (`polyphony.rewards.registry.tell`); a reward's other names are its own."""


@dataclass(slots=True)
class Logged:
    """What rewards logged by TRL's `log_metric` between two logs: by domain and name a sum and how many values it has."""

    sums: dict[tuple[str, str], tuple[float, int]] = field(default_factory=dict)
    whole: Counter[tuple[str, str]] = field(default_factory=Counter)
    """The sums of all ranks since the run was started, or gone on with."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    """Slow rewards grade in a thread of their own."""

    def add(self, domain: str, values: Sequence[tuple[str, float]]) -> None:
        with self._lock:
            for name, value in values:
                if math.isnan(value):  # undefined, and the others' mean would be with it
                    continue
                total, count = self.sums.get((domain, name), (0.0, 0))
                self.sums[domain, name] = (total + value, count + 1)

    def join(self, sums: Mapping[tuple[str, str], tuple[float, int]]) -> None:
        """Take in what another one has summed."""
        with self._lock:
            for place, (total, count) in sums.items():
                known = self.sums.get(place, (0.0, 0))
                self.sums[place] = (known[0] + total, known[1] + count)

    def flush(self, family: str, gather: Callable[[list], list] = list) -> dict[str, float]:
        """Return the means over all ranks under a family's names and start anew; collective where `gather` is."""
        with self._lock:
            sums, self.sums = self.sums, {}
        totals: dict[tuple[str, str], tuple[float, int]] = {}
        for place, (total, count) in gather(list(sums.items())):
            known = totals.get(place, (0.0, 0))
            totals[place] = (known[0] + total, known[1] + count)
            self.whole[place] += total
        return defined(
            {
                key(family, name, domain) if name in OF_GRADERS else f"{family}/{domain}/logged/{name}": total / count
                for (domain, name), (total, count) in sorted(totals.items())
            }
        )


@dataclass(slots=True)
class Meter:
    """Per-domain metrics between two logs. `domains` is fixed, so that every rank reduces the same shape."""

    domains: tuple[str, ...]
    is_useful: Callable[[Group], bool] = lambda group: group.has_signal
    """Whether a group can move the policy."""
    sums: dict[str, DomainSums] = field(default_factory=dict)
    diversity: dict[str, DiversitySums] = field(default_factory=dict)
    """Of the domains with a diversity reward."""
    acted: dict[str, EpisodeSums] = field(default_factory=dict)
    """Of the domains that act."""
    skill_of: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """By domain and id of a prompt; those without one are not in it."""
    skills: dict[str, DomainSums] = field(default_factory=dict)
    seconds: float = 0.0
    """Spent generating."""
    draws: int = 0
    rounds: int = 0
    """Of refill."""

    def add(
        self,
        groups: Sequence[Group],
        entropy: Mapping[str, tuple[float, float]],
        seconds: float,
        *,
        discarded: Sequence[Group] = (),
        rounds: int = 0,
        unmeasured: Mapping[str, int] | None = None,
        by_turn: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    ) -> None:
        """Take in one draw: its groups, per domain and skill the summed entropy and its token count, the time it took.

        `discarded` are the groups that were generated too, but replaced, in that many refill `rounds`; `unmeasured` counts
        their completions, by domain, that the entropies leave out. `by_turn` has, per domain that acts, the same sums of
        each turn.
        """
        for group in (*groups, *discarded):
            counted = DomainSums.of(group, is_useful=self.is_useful(group))
            self.sums.setdefault(group.domain, DomainSums()).add(counted)
            if skill := self.skill_of.get((group.domain, group.prompt_id)):
                self.skills.setdefault(skill, DomainSums()).add(counted)
            for episode, reward in zip(group.episodes, group.rewards, strict=False):  # in a domain that acts
                self.acted.setdefault(group.domain, EpisodeSums()).add(episode, reward)
        for group in groups:
            self.sums[group.domain].update_with(group, is_useful=self.is_useful(group))
            if group.fused is not None:
                self.diversity.setdefault(group.domain, DiversitySums()).add(group)
        self.draws += 1
        self.rounds += rounds
        for name, (total, tokens) in entropy.items():
            sums = (self.sums if name in self.domains else self.skills).setdefault(name, DomainSums())
            sums.entropy += total
            sums.entropy_tokens += tokens
        for name, turns in (by_turn or {}).items():
            if name in self.acted:
                self.acted[name].add_entropy(turns)
        for name, count in (unmeasured or {}).items():
            self.sums[name].entropy_unmeasured += count
        self.seconds += seconds

    def flush(self) -> dict[str, float]:
        """Return all metrics since the last flush and start anew; undefined ones are absent."""
        sums, diversity, seconds, draws, rounds = self.sums, self.diversity, self.seconds, self.draws, self.rounds
        self.sums, self.diversity, self.seconds, self.draws, self.rounds = {}, {}, 0.0, 0, 0
        metrics = {
            key("domain", metric, name): value
            for name, counted in sums.items()
            if counted.completions
            for metric, value in counted.metrics().items()
        }
        skills, self.skills = self.skills, {}
        for name, counted in skills.items():
            told = counted.metrics()
            metrics.update({key("skill", metric, name): told[metric] for metric in ("reward", "entropy", "n")})
        acted, self.acted = self.acted, {}
        for name, episodes in acted.items():
            metrics.update({key("environment", metric, name): value for metric, value in episodes.metrics().items()})
        for name, compared in diversity.items():
            metrics.update({key("diversity", metric, name): value for metric, value in compared.metrics().items()})
        tokens = sum(s.tokens for s in sums.values())
        metrics[key("rollout", "tokens_per_s")] = _ratio(tokens, seconds)
        metrics[key("rollout", "useful_token_frac")] = _ratio(sum(s.useful_tokens for s in sums.values()), tokens)
        metrics[key("rollout", "refill_rounds")] = _ratio(rounds, draws)
        dead = sum(s.dead_correct + s.dead_wrong + s.dead_equal for s in sums.values())
        metrics[key("rollout", "shortfall")] = _ratio(dead, draws)
        return defined(metrics)


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan
