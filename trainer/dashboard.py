"""Every metric name of ours, once. TRL's own keys stay as they are; ours stand beside them.

Keys are `domain/<d>/<metric>`, `curriculum/<d>/<metric>`, `heldout/<d>/<metric>`, `diversity/<d>/<metric>`,
`shortcuts/<d>/<metric>`, `transfer/<d>/<metric>`, `rollout/<metric>` and `faults/<metric>`. Undefined values are
absent, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

METRICS: Mapping[str, Mapping[str, str]] = {
    "domain": {
        "reward": "mean reward over graded completions since the last log",
        "reward_std": "standard deviation of those rewards",
        "entropy": "mean token entropy of the policy in nats, over all rows drawn, dead groups included",
        "entropy_slope": "change of that entropy per optimizer step over the domain's last 32 draws",
        "entropy_place": "where the last 8 draws lie in the band: 0 at its low edge, 1 at its high one",
        "entropy_coef": "coefficient of the domain's entropy in the loss, where `entropy.control` asks for it",
        "pass_rate": "share of graded completions with reward 1",
        "frac_dead": "share of groups drawn that teach nothing: rewards all equal (`algorithm: rft`: none accepted)",
        "dead_completions": "share of completions that lie in such groups",
        "dead_correct": "share of the groups that went on to the update which are dead because all was correct",
        "dead_wrong": "the same, dead because all was equally wrong",
        "dead_equal": "the same, dead because all had the same partial reward",
        "mean_length": "tokens a completion",
        "clipped_ratio": "share of completions cut at the length limit",
        "grader_failures": "completions whose reward raised or returned None",
        "n": "completions drawn",
    },
    "curriculum": {
        "mixture": "share of the last draw that the scheduler asked for",
        "active": "prompts in the band worth practising (with `pool`)",
        "deferred": "prompts too hard for now",
        "impossible": "prompts too hard with 95 % confidence",
        "mastered": "prompts above the band",
    },
    "shortcuts": {
        "answer_repetition": "share of completions that say their answer three times or more",
        "repeated_ngrams": "share with more than 30 % repeated 8-grams",
        "computation_skipping": "share far shorter than the domain's correct ones, or without the solution's steps",
        "bare_answer": "share with an answer and hardly anything before it",
        "language_mixing": "share with more than 5 % of the letters in other scripts than Latin and Greek",
        "truncation": "share cut at the length limit",
        "rare_successes": "full rewards of groups with one, or at most a quarter",
        "suspects": "full rewards with a sign that is not the domain's manner; rare ones only until that is known",
        "correct_length": "median tokens of the last 64 correct completions",
    },
    "heldout": {
        "score": "mean held-out score in [0, 1], `report` half",
        "entropy": "mean token entropy on held-out completions in nats",
        "pass_at_k": "share of held-out items (`report` half) with a full score in any of the k samples",
        "grader_failures": "held-out samples without a reward, all items: left out of scores, not passed in pass_at_k",
        "majority": "score of the answer that most of an item's samples give, ties shared",
        "greedy": "score without chance in decoding, with `eval.greedy`",
        "format_valid": "share of samples that end, say something and have the form their grader asks for",
        "format_share": "share of the commonest output style",
        "ece": "expected calibration error of the answers' token probabilities, ten bins of equal mass",
        "brier": "mean squared distance of that probability and being right",
        "auroc": "probability that a right answer has more of it than a wrong one",
        "overconfidence": "its mean minus the share of right answers",
        "kl_base": "KL(base || policy) in nats per token, on the base model's completions of held-out prompts",
        "kl_current": "mean of kl_base over the domains practised since the last evaluation",
        "kl_others": "mean of kl_base over all other domains",
        "distinct_2": "different over all pairs of neighbouring words in an item's samples",
        "self_bleu": "mean BLEU of an item's samples against its other samples, 1 where all are alike",
        "vendi": "Vendi score: effective number of different samples of an item, by the words they share",
        "unique_correct": "answers of an item that say something else, among those with the full score",
        "classes": "answers of an item that say something else, in domains with a diversity reward",
    },
    "diversity": {
        "classes": "classes of answers that say the same, a group, in domains with a diversity reward",
        "mean": "how much an answer differs from its siblings, in [0, 1], after the floor",
        "collapsed": "share of groups whose answers all say the same",
        "reward": "mean of quality and difference fused, what the update learns from; quality is domain/<d>/reward",
        "failures": "groups that the partitioner could not tell apart: their completions have no reward",
    },
    "transfer": {
        "bwt": "score now minus score at the end of the domain's last finished stage (watch-only: minus the baseline)",
        "bwt_low": "lower end of its 95 % interval, paired by item",
        "bwt_high": "upper end",
        "fwt": "score before the domain's first stage minus the baseline's",
        "drawdown": "score now minus the cross-fitted best so far; over all domains `drawdown_max`, as a loss",
        "drawdown_low": "lower end of its 95 % interval",
        "drawdown_high": "upper end",
        "drawdown_max": "the largest loss of any domain against its cross-fitted best so far, as a positive number",
    },
    "rollout": {
        "tokens_per_s": "generated tokens a second of generation",
        "refill_rounds": "rounds a draw in which dead groups were replaced",
        "shortfall": "dead groups a draw that refill could not replace",
        "useful_token_frac": "share of generated tokens that lie in groups with signal",
    },
    "faults": {
        "skipped_steps": "optimizer steps left out because loss or gradient was not finite",
        "workers_restarted": "rollout workers that were lost or hung, and replaced",
        "regenerated": "completions sampled again because their worker was lost",
        "stale": "completions of an older weight version, refused or importance-corrected",
    },
}


def key(family: str, metric: str, domain: str | None = None) -> str:
    """Return the full name of a metric. Raises KeyError for one that METRICS does not list."""
    METRICS[family][metric]
    return f"{family}/{metric}" if domain is None else f"{family}/{domain}/{metric}"


def defined(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Return the metrics that have a finite value: JSON knows neither NaN nor infinity."""
    return {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}
