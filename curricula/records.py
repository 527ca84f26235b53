"""The nouns: a prompt, its completions, their group, the rollout of a draw; evaluations, evidence, decisions.

Frozen records. K domains, G completions a group. Undefined is NaN, never 0; a grader's failure is None.
"""

from __future__ import annotations

import functools
import json
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import Any, Literal, TypeVar

from pydantic import Field, field_validator

from polyphony.curricula.declarations import settings

T = TypeVar("T")

Kind = Literal["structured", "open_ended"]
"""`structured`: a program can tell whether an answer is right. `open_ended`: many answers are good."""


Compared = Literal["answers", "transcripts"]
"""What of completions is compared: of several turns the last, or all that was said."""


AdvantageKind = Literal["group", "mean_only"]
"""(r - mean) / std of the group, as TRL has it, or r - mean."""


@settings
class Domain:
    """One subject that is trained (`train` given) or only watched (`train` None).

    Example: `Domain(name="math", kind="structured", train="math.jsonl", heldout="math_test.jsonl", reward="math")`
    """

    name: str
    """Stands in metric keys: no spaces, slashes, quotes or brackets."""
    kind: Kind
    """`structured`: a program can tell whether an answer is right. `open_ended`: many answers are good."""
    train: Any = None
    """Training rows: a path (of a file, of a folder, a glob) or a list of paths, `hf://org/name`, `{path, name, split,
    revision, limit}` (`name`: a hub set's config), `{generator: pkg.module:function, **arguments}`, `{environment:
    pkg.module:Class, count, seed}` (of its class method `rows`); in Python also a list of dicts or a `datasets.Dataset`.
    Without them the domain is watch-only."""
    heldout: Any = None
    """Rows for held-out evaluation, in the same forms; never trained on."""
    reward: Any = None
    """A registry name, an import path `pkg.module:name`, a mapping `{name, **arguments}`, a callable like TRL's, or a list
    of these (mappings with a `weight`): their weighted sum. May be left out where the environment has `get_reward`, whose
    reward is added to it."""
    environment: Any = None
    """What the policy acts in, over several turns: an import path `pkg.module:Class`, a mapping `{name, **arguments}`, in
    Python also a class or what makes one, as TRL's `environment_factory`: `reset(**columns)`, public methods as tools,
    optionally `get_reward()`; and `reply(message)`, what the user says where no tool was called."""
    tools: Any = None
    """What the policy may call: a list of `python` (a program in the sandbox), import paths of functions, mappings `{name,
    **arguments}`, in Python also functions. With type hints and docstrings, as TRL has them."""
    weight: float = Field(default=1.0, ge=0)
    """Relative share under the `joint` scheduler."""
    advantages: AdvantageKind | None = None
    """How rewards become advantages; null: `mean_only` with `diversity`, else the run's `advantages`."""
    max_completion_length: int | None = Field(default=None, ge=1)
    """Tokens; null: `grpo.max_completion_length`, which it must not exceed."""
    system_prompt: str | None = None
    """Put before every prompt of the domain as a system message."""
    as_chat: bool = True
    """Rows that are text become a user's message where the tokenizer has a chat template; false: they are asked as they
    stand, and rewards get text."""
    chat_template_kwargs: Mapping[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template for this domain's prompts, such as `{enable_thinking: false}`."""
    teacher: str | None = None
    """Under `algorithm: distil`, which of `teachers` scores the domain's completions; null: none, see `distil.others`."""
    diversity: Any = None
    """None, or a `trainer.settings.Diversity` or its fields: reward answers that differ within their group."""

    @field_validator("name")
    @classmethod
    def _fits_a_metric_key(cls, name: str) -> str:
        if not re.fullmatch(r"[^\s/\\\[\]<>&\"'`]+", name) or not name.isprintable() or ".." in f"{name}.":
            raise ValueError(
                "a name is part of metric keys: no spaces, no slash, not empty; nor quotes, brackets, '..'"
            )
        return name

    @property
    def is_watch_only(self) -> bool:
        return self.train is None

    @property
    def acts(self) -> bool:
        """Whether its policy may call tools, or goes on after its first turn."""
        return self.environment is not None or bool(self.tools)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What is asked: one row of a domain. Its name is `domain` and `id`; the rest is filled in where it is drawn.

    Two prompts of one name are equal.

    Example: `Prompt(domain="math", id="9f..", prompt="2 + 2 =", columns={"answer": "4"})`
    """

    domain: str
    id: str
    """A content hash, or the row's own `id`: stable across machines."""
    prompt: str | list[dict[str, Any]] = field(default="", compare=False)
    """Messages, or plain text: without a chat template, and under `as_chat: false`."""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Every other column of the row (`answer` among them): what the reward gets to see."""
    tools: Sequence[Any] = field(default=(), compare=False)
    """Schemas of the functions in the row's column `tools`, which the chat template shows."""
    ids: Sequence[int] = field(default=(), compare=False)
    """Token ids, through the chat template with the domain's arguments."""


UNNAMED = Prompt(domain="", id="")
"""Of a completion that has just come out of an engine, which knows token ids only."""


FAILURES = ("unknown_tools", "bad_arguments", "raised", "bad_results", "malformed_calls")
"""How calls fail, of which the policy is told: there is no such tool, it does not take the arguments, it raised an error, or
its answer is no text. What cannot be read as a call is the turn's text, as in TRL, and none of an episode's `calls`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """What came of a completion of several turns, in a domain that acts."""

    messages: tuple[Mapping[str, Any], ...] = ()
    """After the prompt, in order: what the assistant, tools and users said."""
    turns: int = 0
    """Of the policy."""
    calls: int = 0
    failures: tuple[str, ...] = ()
    """Of each call that failed, one of `FAILURES`."""
    cut: Literal["turns", "length"] | None = None
    """The limit that ended it: of turns that call tools, or of tokens, in a turn or before what the policy is told."""
    fault: str | None = None
    """What went wrong in the environment, in words."""
    is_forfeit: bool = False
    """Whether that was a call's doing, one that never came back or took its process down: the reward is 0. A fault that no
    call caused leaves the completion without one."""
    reward: float | None = None
    """The environment's own (`get_reward`), which is added to the domain's; None where it has none, or cannot tell."""
    last: int = 0
    """Where the tokens of the policy's last turn begin."""
    written: str = ""
    """What the policy said in all turns, a line each."""
    environment: Any = field(default=None, compare=False, repr=False)
    """The instance, for rewards that look at it; only where it lives in this process."""

    @property
    def spoken(self) -> list[tuple[str, str]]:
        """Who spoke and what was said, in order; of calls the name and the arguments. Last, what ended it before its end."""
        found = []
        for message in self.messages:
            said = " ".join(filter(None, (message.get("reasoning_content"), message.get("content"))))
            calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
            called = [f"{call.get('name')}({json.dumps(call.get('arguments'), default=str)})" for call in calls]
            found.append(
                (f"{message['role']} {message.get('name', '')}".strip(), " ".join(filter(None, (said, *called))))
            )
        if ended := self.fault or (f"cut off at the limit of {self.cut}" if self.cut else ""):
            found.append((ended, ""))
        return [(_whole(who), _whole(said)) for who, said in found]

    @property
    def transcript(self) -> str:
        """What was said, a line and who said it for each."""
        return "\n".join(f"[{who}] {said}".rstrip() for who, said in self.spoken)


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What came back to one prompt; filled in step by step, by `replace`.

    The engine gives token ids, log-probabilities and the version of the weights; the policy the prompt, the text and
    whether it was cut off; the reward a number; in training, the shortcut watch its signs. There, what the ranks tell each
    other of it is a place in a `Group`; at an evaluation they also send the few texts that people are shown, and the token
    ids of the items on which the distance to the base model is measured (`EvaluationSettings.shown`, `kl_items`). A
    completion of several turns holds all tokens after the prompt, and a mask of those that the policy wrote; its prompt is
    the one that its environment had begun with.
    """

    ids: Sequence[int]
    """Token ids, the end-of-sequence token included."""
    logps: Sequence[float] | None = None
    """Of each token under the sampling distribution; None where the engine does not tell. Of tokens that the policy did not
    write, 0."""
    tool_mask: Sequence[int] | None = None
    """TRL's: 1 for a token that the policy wrote, 0 for one of a tool's answer or of what frames it; None: it wrote all."""
    version: int | None = None
    """Number of the weight sync whose weights sampled it; None where the engine does not count."""
    prompt: Prompt = UNNAMED
    text: str = ""
    """Of several turns, the last."""
    truncated: bool = False
    """Whether it ran into the length limit."""
    reward: float | None = None
    """None until it was graded, and where the grader failed."""
    signs: tuple[str, ...] = ()
    """Of shortcuts and loops, see `polyphony.trainer.shortcuts`; looked for in training alone."""
    feedback: str | None = None
    """What the reward told of it by `log_extra("feedback", ..)`, for teachers that read it; None where it told nothing."""
    teacher_logps: Sequence[float] | None = None
    """Of each token, by a teacher behind an endpoint; NaN where it gave none, None without such a teacher."""
    episode: Episode | None = None
    """None in a domain that does not act."""

    @property
    def length(self) -> int:
        """Tokens that the policy wrote."""
        return len(self.ids) if self.tool_mask is None else sum(self.tool_mask)

    @property
    def to_read(self) -> str:
        """What was said, for people: of several turns who said it before each."""
        return self.text if self.episode is None else self.episode.transcript

    def to_compare(self, compare: Compared) -> str:
        """What is held against others of its group."""
        return self.text if compare == "answers" else self.to_read

    @property
    def answer(self) -> Completion:
        """The last turn alone, of several."""
        if self.episode is None:
            return self
        last, logps = self.episode.last, self.logps
        logps = None if logps is None else logps[last:]
        return replace(self, ids=self.ids[last:], logps=logps, tool_mask=None, episode=None)

    @property
    def surprisal(self) -> float | None:
        """Sum over its tokens of minus the log-probability under the sampling distribution, nats; None if not told."""
        return None if self.logps is None else -sum(self.logps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fused:
    """What a diversity reward made of one group, [G]; `diversity` and `classes` None where its texts could not be told."""

    rewards: tuple[float | None, ...]
    """Quality and difference in one number; None where either is unknown."""
    diversity: tuple[float, ...] | None
    """How much each text differs from its siblings, in [0, 1]."""
    classes: tuple[int, ...] | None
    """The class of each text, numbered from 0."""


KINDS = 4096
"""Groups whose numbers are kept by their rewards: of eight that are 0 or 1 there are 256."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The G graded completions of one prompt in one draw: what ranks tell each other, and what the curriculum learns from.

    Example: `Group(prompt_id="9f..", domain="math", draw=3, rewards=(1.0, 0.0, None, 0.0), lengths=(5, 9, 12, 7),
    truncated=(False,) * 4)`
    """

    prompt_id: str
    domain: str
    draw: int
    rewards: tuple[float | None, ...]
    """[G]; None where the grader failed, which is never evidence of difficulty."""
    lengths: tuple[int, ...]
    """[G], tokens that the policy wrote."""
    truncated: tuple[bool, ...]
    """[G]; True where the completion ran into the length limit."""
    surprisals: tuple[float | None, ...] = ()
    """[G]; `Completion.surprisal`."""
    signs: tuple[tuple[str, ...], ...] = ()
    """[G]; `Completion.signs`."""
    texts: tuple[str, ...] = ()
    """[G] where texts of a group are compared with each other, else empty."""
    prints: tuple[int, ...] = ()
    """[G]; a number of each completion's token ids, alike where these are."""
    episodes: tuple[Episode, ...] = ()
    """[G] in a domain that acts, else empty; what is counted of each, without what was said."""
    fused: Fused | None = None
    """In a domain with a diversity reward: `rewards` are the quality then, and these are what the update learns from."""
    look: int | None = None
    """With early stop of groups (`pool.look`): how many were sampled first; the rest only if their rewards differ. None:
    all."""

    @classmethod
    def of(
        cls,
        completions: Sequence[Completion],
        *,
        draw: int,
        compare: Compared | None = None,
    ) -> Group:
        """Return completions of one prompt as a group, or as a rank's part of one, with the texts that are compared.

        Raises ValueError where they are of more than one prompt.
        """
        prompts = {c.prompt for c in completions}
        if len(prompts) != 1:
            raise ValueError(f"a group is of one prompt, got {sorted(p.id for p in prompts)}")
        (prompt,) = prompts
        return cls(
            prompt_id=prompt.id,
            domain=prompt.domain,
            draw=draw,
            rewards=tuple(c.reward for c in completions),
            lengths=tuple(c.length for c in completions),
            truncated=tuple(c.truncated for c in completions),
            surprisals=tuple(c.surprisal for c in completions),
            signs=tuple(c.signs for c in completions),
            texts=() if compare is None else tuple([c.to_compare(compare) for c in completions]),
            prints=tuple(hash(tuple(c.ids)) for c in completions),
            episodes=tuple(_counts(c.episode) for c in completions if c.episode is not None),
        )

    def joined(self, other: Group) -> Group:
        """Return this with the other's completions behind its own. Raises ValueError where its prompt is another."""
        if (self.domain, self.prompt_id) != (other.domain, other.prompt_id):
            raise ValueError(f"a group is of one prompt, got {[self.prompt_id, other.prompt_id]}")
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in COLUMNS})

    def filled(self, size: int) -> Group:
        """Return the group as its rows of the update are: its completions repeated until there are `size`."""
        if len(self.rewards) == size:
            return self
        return replace(self, **{name: repeated(getattr(self, name), size) for name in COLUMNS})

    def shuffled(self, chance: random.Random) -> Group:
        """Return the group with its rewards, and those fused, dealt anew among its completions."""
        order = chance.sample(range(len(self.rewards)), len(self.rewards))
        fused = self.fused and replace(self.fused, rewards=tuple([self.fused.rewards[i] for i in order]))
        return replace(self, rewards=tuple([self.rewards[i] for i in order]), fused=fused)

    @property
    def learned(self) -> tuple[float | None, ...]:
        """[G]; what the update learns from: the rewards, or quality and difference fused."""
        return self.rewards if self.fused is None else self.fused.rewards

    @property
    def graded(self) -> tuple[float, ...]:
        """The rewards that exist, in order."""
        return tuple([r for r in self.rewards if r is not None])

    @property
    def unselected(self) -> tuple[float, ...]:
        """The rewards that exist of the completions sampled first: their mean is unbiased under early stop too."""
        return tuple([r for r in self.rewards[: self.look] if r is not None])

    @property
    def mean_reward(self) -> float:
        """Mean over graded completions; NaN if there are none."""
        return mean(self.graded)

    @property
    def pass_rate(self) -> float:
        """Share of graded completions that pass; NaN if none was graded."""
        return pass_rate(self.graded)

    @property
    def has_signal(self) -> bool:
        """False where all that could be learned from is equal: such a group has no gradient (a dead group)."""
        return len({r for r in self.learned if r is not None}) > 1

    @property
    def is_alike(self) -> bool:
        """Whether all its completions are the same, token by token; False for a single one."""
        return len(self.prints) > 1 and len(set(self.prints)) == 1

    @property
    def cause(self) -> Literal["all_correct", "all_wrong", "all_equal", "ungraded"]:
        """Why it taught nothing, if it did not; a grader's failure is not the policy's.

        `all_equal`: the same partial reward, between 0 and 1, for all.
        """
        if not self.graded:
            return "ungraded"
        if len(set(self.graded)) == 1 and 0 < self.graded[0] < 1:
            return "all_equal"
        return "all_correct" if self.pass_rate == 1.0 else "all_wrong"

    @property
    def abs_advantage(self) -> float:
        """Mean |A| with A = (r - mean) / population std, 0 for a dead group; NaN if there is nothing to learn from.

        For binary rewards it is 2 sqrt(p (1 - p)) (SEC, arXiv:2505.14970).
        """
        return abs_advantage(tuple([r for r in self.learned if r is not None]))


def written(completions: Iterable[Completion]) -> list[tuple[str, int]]:
    """Return what the policy said in each completion, in all turns, and in how many tokens."""
    return [(c.text if c.episode is None else c.episode.written, c.length) for c in completions]


def _whole(text: str) -> str:
    """Return a text without halves of characters, as a call's name may hold: no file takes them."""
    return text.encode(errors="replace").decode()


def _counts(episode: Episode) -> Episode:
    """Return an episode without what was said in it: what ranks tell each other."""
    return replace(episode, messages=(), written="", environment=None)


@functools.lru_cache(maxsize=KINDS)
def pass_rate(graded: tuple[float, ...]) -> float:
    """Return the share of the rewards that pass; NaN for none."""
    return len(passed(graded)) / len(graded) if graded else math.nan


@functools.lru_cache(maxsize=KINDS)
def abs_advantage(learned: tuple[float, ...]) -> float:
    """Return `Group.abs_advantage` of the rewards that exist."""
    if not learned:
        return math.nan
    if len(set(learned)) == 1:
        return 0.0  # by their equality: the rounded mean of equal rewards may differ from them
    centre = mean(learned)
    distances = [abs(r - centre) for r in learned]
    return mean(distances) / math.sqrt(mean([d * d for d in distances]))


def repeated(items: Sequence[T], size: int) -> tuple[T, ...]:
    """Return `size` items, by beginning again: how what was not sampled of a group is stood for."""
    return tuple(islice(cycle(items), size))


COLUMNS = ("rewards", "lengths", "truncated", "surprisals", "signs", "texts", "prints", "episodes")
"""The fields of a group that have an entry a completion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One draw, generated and scored: this rank's rows, and the groups of all ranks, by their place in the draw."""

    rows: Mapping[int, Completion]
    """This rank's, whole groups as TRL wants them, by the row's place in the draw."""
    groups: Mapping[int, Group]
    """With what was sampled of each, fewer than `size` where a group was stopped early."""
    size: int
    """Rows a group."""
    seconds: float
    """Spent generating."""
    discarded: tuple[Group, ...] = ()
    """Groups that taught nothing and were replaced, or came as replacements and taught nothing either."""
    rounds: int = 0
    """Refill rounds made."""

    @property
    def groups_of_rows(self) -> list[Group]:
        """Of all ranks, in rank order, each with a member a row."""
        return [group.filled(self.size) for group in self.groups.values()]

    @property
    def rewards(self) -> list[float | None]:
        """What the update learns from, a reward a row of all ranks, in rank order."""
        return [reward for group in self.groups_of_rows for reward in group.learned]

    @property
    def sampled(self) -> list[Group]:
        """All groups, those that were replaced too."""
        return [*self.groups.values(), *self.discarded]

    def refilled(self, fresh: Rollout, better: Sequence[int]) -> Rollout:
        """Return the draw after a round of refill: the fresh groups at the places `better` in the stead of its own."""
        rows = {i: row for i, row in fresh.rows.items() if i // self.size in better}
        groups = {k: fresh.groups[k] for k in better}
        replaced = [self.groups[k] for k in better]
        in_vain = [group for k, group in fresh.groups.items() if k not in groups]
        return replace(
            self,
            rows=dict(sorted((dict(self.rows) | rows).items())),
            groups=dict(sorted((dict(self.groups) | groups).items())),
            seconds=self.seconds + fresh.seconds,
            discarded=(*self.discarded, *replaced, *in_vain),
            rounds=self.rounds + 1,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What every domain's held-out set said at one moment: one row of the transfer matrix.

    `trained` empty is the baseline; one name with `probe` is a single-domain probe; all names with `probe` the joint
    run; one name without `probe` is a moment in that domain's stage of a run. With `arm`, another way to train all.
    """

    trained: tuple[str, ...]
    step: int
    """Optimizer steps done when this was measured."""
    seed: int
    scores: Mapping[str, tuple[float | None, ...]]
    """Per domain, one score in [0, 1] an item, in the order of the held-out set; None where it could not be graded."""
    entropy: Mapping[str, float] = field(default_factory=dict)
    """Per domain, mean token entropy in nats at the run's temperature; absent where it was not measured."""
    entropy_items: Mapping[str, tuple[tuple[float, int], ...]] = field(default_factory=dict)
    """Per domain, (nats, tokens) of each item, of which `entropy` is the ratio of the sums; empty where it was not kept."""
    kl_items: Mapping[str, tuple[tuple[float, int] | None, ...]] = field(default_factory=dict)
    """Per domain, (nats, tokens) of each item's KL(base || policy); None for an item on which it is not measured."""
    exposure: Mapping[str, int] = field(default_factory=dict)
    """Prompts drawn of each domain since the run began."""
    probe: bool = False
    placebo: bool = False
    """A probe whose rewards were shuffled among the completions of each prompt: what it changed is the noise's work."""
    rolled_back: bool = False
    """Since the row before, a guardrail took the weights back to a checkpoint: the change is not of practice alone."""
    recovery: bool = False
    """What was practised since the row before was a guardrail's recovery of the domain in `trained`: no stage, and no
    evidence for schedulers."""
    arm: Mapping[str, Any] = field(default_factory=dict)
    """Of a probe of all domains that was not trained on all at once, what it was: `kind` is `sequence`, `groups`, `merge` or
    `distil`, what else there is says how (`stages`; `method` of a merge with its settings)."""
    tokens: int | None = None
    """Rollout tokens that its training sampled; None where they were not counted."""

    @property
    def has_gaps(self) -> bool:
        """Whether an item could not be graded."""
        return any(None in items for items in self.scores.values())

    def mean_score(self, domain: str) -> float:
        """Return the mean over a domain's graded items; NaN if there are none."""
        return mean(graded(self.scores[domain]))

    def as_row(self) -> dict[str, Any]:
        """Return the row of `transfer.json`."""
        row = {
            "trained": list(self.trained),
            "step": self.step,
            "seed": self.seed,
            "scores": {name: list(items) for name, items in self.scores.items()},
            "entropy": dict(self.entropy),
            "exposure": dict(self.exposure),
            "probe": self.probe,
        }
        row |= {"placebo": True} if self.placebo else {}
        row |= {"rolled_back": True} if self.rolled_back else {}
        row |= {"recovery": True} if self.recovery else {}
        row |= {"arm": dict(self.arm)} if self.arm else {}
        row |= {} if self.tokens is None else {"tokens": self.tokens}
        # last, because a run that goes on reads a row without them
        by_item = {"entropy_items": self.entropy_items, "kl_items": self.kl_items}
        return row | {key: {name: list(pairs) for name, pairs in of.items()} for key, of in by_item.items() if of}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Evaluation:
        """Read a row of `transfer.json`; all but the first four keys may be absent."""
        return cls(
            trained=tuple(row["trained"]),
            step=row["step"],
            seed=row["seed"],
            scores={name: tuple(items) for name, items in row["scores"].items()},
            entropy=dict(row.get("entropy", {})),
            entropy_items=_pairs(row.get("entropy_items", {})),
            kl_items=_pairs(row.get("kl_items", {})),
            exposure=dict(row.get("exposure", {})),
            probe=bool(row.get("probe", False)),
            placebo=bool(row.get("placebo", False)),
            rolled_back=bool(row.get("rolled_back", False)),
            recovery=bool(row.get("recovery", False)),
            arm=dict(row.get("arm", {})),
            tokens=row.get("tokens"),
        )


def own(evaluations: Iterable[Evaluation]) -> tuple[Evaluation, ...]:
    """Return the evaluations that are a scheduler's own: not those during a recovery."""
    return tuple(evaluation for evaluation in evaluations if not evaluation.recovery)


def _pairs(by_domain: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
    return {name: tuple([pair and tuple(pair) for pair in pairs]) for name, pairs in by_domain.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainStats:
    """What one draw showed of one domain; means are `rounded`, so that the log of decisions has what was decided from."""

    groups: int = 0
    reward: float = math.nan
    """Mean reward over graded completions."""
    pass_rate: float = math.nan
    abs_advantage: float = math.nan
    """Mean over groups of `Group.abs_advantage`."""
    frac_dead: float = math.nan
    """Share of groups without signal."""
    entropy: float = math.nan
    """Nats per token over all rows of the draw, dead groups included."""
    tokens: int = 0
    teacher_kl: float = math.nan
    """Nats per token between the policy and the domain's teacher, on the policy's completions; NaN without one. Where there
    is one, `abs_advantage` is that of the tokens, and no group is dead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lessons:
    """What a draw's completions of one domain and their teacher's log-probabilities gave."""

    kl: float
    """Mean over tokens of log pi - log pi_teacher, nats: an unbiased estimate of KL(policy || teacher)."""
    abs_advantage: float
    """Mean |advantage| of a token, as it is learned from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """All that a scheduler decides from before one draw. Tuples over trainable domains, [K], in the recipe's order."""

    draw: int
    """Index of the draw to be decided, from 0."""
    total_draws: int
    """Draws planned for the whole run."""
    domains: tuple[str, ...]
    kinds: tuple[Kind, ...]
    weights: tuple[float, ...]
    sizes: tuple[int, ...]
    """Training prompts in each domain."""
    drawn: tuple[int, ...]
    """Prompts drawn of each domain so far."""
    last: tuple[DomainStats, ...]
    """What the previous draw showed; `groups` 0 where a domain was not drawn."""
    evaluations: tuple[Evaluation, ...] = ()
    """Held-out rows so far, oldest first, reduced to the `steer` half."""
    notes: tuple[str, ...] = ()
    """What happened to the run since the last draw that a scheduler should know (a rollback, an alarm)."""
    alarms: tuple[str, ...] = ()
    """Domains, watch-only ones included, that the notes are about: what hurt them should be practised less."""

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1)."""
        return self.draw / self.total_draws


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """A scheduler's answer: probabilities over trainable domains [K], why in words, and its own next state."""

    mixture: tuple[float, ...]
    reason: str
    state: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able; handed back at the next draw and saved in checkpoints."""
    stage: str | None = None
    """The domain whose stage this draw belongs to, where the scheduler works in stages; of a group of domains all names,
    `a, b`."""


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean; NaN for no values."""
    return sum(values) / len(values) if values else math.nan


def graded(scores: Sequence[float | None]) -> Sequence[float]:
    """Return the scores that exist, in order."""
    return [score for score in scores if score is not None] if None in scores else scores  # type: ignore[return-value]


def rounded(value: float) -> float:
    """Return the value to four significant digits, which is finer than the noise of anything that one draw shows."""
    return float(f"{value:.4g}")


def per_token(pairs: Iterable[tuple[float, float]]) -> float:
    """Return the sum of (nats, tokens) in nats per token; NaN without tokens."""
    nats, tokens = map(sum, zip(*pairs, strict=True)) if (pairs := list(pairs)) else (0.0, 0)
    return nats / tokens if tokens else math.nan


def null_of(value: float) -> float | None:
    """Return a number as JSON has it: null for NaN."""
    return None if math.isnan(value) else value


def nan_of(value: float | None) -> float:
    """Return a number as JSON had it."""
    return math.nan if value is None else value


FULL_REWARD = 1.0
"""What a right answer earns."""


def passes(reward: float | None) -> bool:
    """Whether a completion got the full reward, or an answer the full score, which is what pass rates count.

    One that could not be graded did not.
    """
    return reward is not None and reward >= FULL_REWARD


def passed(rewards: Sequence[float | None]) -> list[int]:
    """Return the places of those that pass, by the rule of `passes`: written out here, as every completion comes by."""
    return [i for i, reward in enumerate(rewards) if reward is not None and reward >= FULL_REWARD]
