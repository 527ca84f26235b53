"""`polyphony merge`: experts become one model, by weights that are given or sought on a recipe's held-out sets.

A search sees the deciding half of every set alone; the half that is published says what it won over the weights it began
with.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyphony.curricula.records import graded, mean
from polyphony.curricula.transfer.halves import Half, taken
from polyphony.launch.build import build_trainer, grpo_config, load_data, untaught
from polyphony.launch.recipe import Recipe, RecipeError
from polyphony.launch.verbs.arms import plan_arms, tokens
from polyphony.launch.verbs.evaluate import compare_results, weights_of
from polyphony.launch.verbs.tables import changes_table
from polyphony.trainer.merging.search import Weights, search_weights, with_weights
from polyphony.trainer.merging.settings import MergeSettings, check_out
from polyphony.trainer.run import say

if TYPE_CHECKING:
    from polyphony.curricula.intervals import Interval
    from polyphony.trainer.domains import DomainData
    from polyphony.trainer.engine.engine import Engine
    from polyphony.trainer.evaluation.result import HeldoutResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Merging:
    """What one call of the verb asks for.

    Example: `Merging.of(["runs/math", "runs/code"], base="Qwen/Qwen3-0.6B", settings=MergeSettings()).into(Path("both"))`
    """

    experts: tuple[str, ...]
    base: str | None
    settings: MergeSettings

    @classmethod
    def of(cls, experts: Sequence[str], *, base: str | None, settings: MergeSettings) -> Merging:
        """Find what run folders hold. Raises ValueError, before torch comes, where number or settings are wrong."""
        settings.check(len(experts), has_base=base is not None)
        return cls(experts=tuple(map(weights_of, experts)), base=base and weights_of(base), settings=settings)

    def into(self, out: Path, *, weights: Weights | None = None, about: Mapping[str, Any] | None = None) -> Path:
        """Merge, with other weights where they are given, into the new folder `out`."""
        # slow to import
        from polyphony.trainer.merging.merge import merge

        settings = self.settings if weights is None else with_weights(self.settings, weights)
        return merge(self.experts, out, settings=settings, base=self.base, about=about)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """What a search found."""

    tried: Mapping[Weights, float]
    """Weights and the mean over domains of the deciding half's score, in the order they were tried."""
    tokens: int
    """The most that it generated."""
    published: Mapping[str, Mapping[str, Interval]]
    """By domain and statistic, the best weights minus the first ones on the half that is published; empty where these are
    the best ones."""
    is_refuted: bool = False
    """Whether a domain is worse there, by interval: the first weights are kept then."""

    @property
    def weights(self) -> Weights:
        return next(iter(self.tried)) if self.is_refuted else max(self.tried, key=self.tried.__getitem__)

    def as_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        tried = [{"weights": list(weights), "score": score} for weights, score in self.tried.items()]
        scores = {name: [*of["score"]] for name, of in self.published.items() if "score" in of}
        return {"weights": list(self.weights), "tried": tried, "tokens": self.tokens, "published": scores}

    def __str__(self) -> str:
        lines = [f"{_said(weights)}: {score:.3f}" for weights, score in self.tried.items()]
        told = f"weights {_said(self.weights)} of {len(lines)} tried; mean score of the deciding half:"
        if not self.published:
            return "\n".join([told, *lines, "no others were better than the first"])
        first = _said(next(iter(self.tried)))
        head = f"minus {first} on the published half; * where the 95 % interval excludes zero"
        return "\n".join([told, *lines, head, changes_table(self.published)])


@dataclass(kw_only=True, slots=True)
class Search:
    """Merges scored on a recipe's held-out sets, one after the other, through one engine."""

    merging: Merging
    recipe: Recipe
    scratch: Path
    engine: Engine | None = None
    data: dict[Half, DomainData] = field(default_factory=dict)
    """The held-out sets' halves."""
    items: int = 0
    """In both halves together."""

    def read(self) -> None:
        """Read the held-out rows. Raises RecipeError where a half of a set has fewer than two items."""
        args = grpo_config(self.recipe, self.scratch)
        whole = load_data(self.recipe, args)
        self.items = sum(map(len, whole.heldout.values()))
        for half in ("steer", "report"):
            tables = {name: table.only(taken(table.ids, table.ids, half)) for name, table in whole.heldout.items()}
            for name, table in tables.items():
                if len(table) < 2:
                    raise RecipeError(
                        f"domains.{name}.heldout: a half of its {len(whole.heldout[name])} rows is too few"
                    )
            self.data[half] = replace(whole, heldout=tables)

    def cost(self, half: Half) -> int:
        """Return the most tokens that one evaluation of a half generates."""
        data = self.data[half]
        return self.recipe.eval.samples * sum(len(table) * data.limits[n] for n, table in data.heldout.items())

    def evaluate(self, weights: Weights, half: Half) -> HeldoutResult:
        """Return what the merge with these weights does on one half."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            model = self.merging.into(Path(folder) / "merged", weights=weights)
            plain = {"model": str(model.resolve()), "lora": None, "adapter": None}
            settings = replace(self.recipe.eval, greedy=False, kl_items=0)
            recipe = untaught(self.recipe).model_copy(update={**plain, "eval": settings})
            trainer = build_trainer(recipe, Path(folder) / "out", engine=self.engine, data=self.data[half])
            self.engine = trainer.policy.engine
            result = trainer.evaluator.run()
        result.check_failures(most=self.recipe.rollouts.max_grader_failures)
        return result

    def score(self, weights: Weights) -> float:
        """Return the mean over domains of their mean score on the deciding half."""
        scores = [mean(graded(items)) for items in self.evaluate(weights, "steer").scores().values()]
        say(f"merge: weights {_said(weights)}: {mean(scores):.3f}")
        return mean(scores)


def search(merging: Merging, recipe: Recipe, out: Path, *, share: float, engine: Engine | None = None) -> Chosen:
    """Choose weights, for at most that share of the tokens of a probe by the recipe, and merge with them into `out`.

    What it will generate is said before. Raises RecipeError where that buys too little.
    """
    try:
        out = check_out(out)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if not share > 0:
        raise RecipeError(f"--share {share:g}: expected a share of a probe's tokens, above 0")
    recipe = recipe.model_copy(update={"model": merging.base or merging.experts[0]})
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        seeking = Search(merging=merging, recipe=recipe, scratch=Path(scratch), engine=engine)
        seeking.read()
        most, spent = _bought(seeking, share)
        count = len(merging.experts)
        tried = search_weights(seeking.score, merging.settings, experts=count, most=most)
        found = Chosen(tried=tried, tokens=spent, published={})
        if found.weights != (first := next(iter(tried))):
            before, after = (seeking.evaluate(weights, "report") for weights in (first, found.weights))
            found = replace(found, published=compare_results(before, after))
            if lost := [name for name, of in found.published.items() if "score" in of and of["score"].high < 0]:
                say(f"merge: on the published half {', '.join(lost)} is worse than with {_said(first)}: these are kept")
                found = replace(found, is_refuted=True)
    merging.into(out, weights=found.weights, about={"search": found.as_json()})
    return found


def _bought(seeking: Search, share: float) -> tuple[int, int]:
    """Return how many weights can be tried, and the most tokens of it all; say so."""
    names = [name for name, section in seeking.recipe.domains.items() if section.train is not None]
    probe = sum(tokens(seeking.recipe, plan_arms(seeking.recipe, names), items=seeking.items))
    each, judged = seeking.cost("steer"), 2 * seeking.cost("report")
    most = int((share * probe - judged) // each)
    if most < 2:
        needed = (2 * each + judged) / probe
        raise RecipeError(
            f"--search: {share:.2g} of a probe's tokens ({probe / 1e6:.2g} million) do not pay for two weights and their "
            f"judgement: give --share {needed:.2g}, or fewer eval.samples"
        )
    spent = most * each + judged
    say(
        f"merge: at most {spent / 1e6:.2g} million tokens, {spent / probe:.1%} of a probe's: up to {most} weights on the "
        "deciding half, the first and the best on the other"
    )
    return most, spent


def _said(weights: Weights) -> str:
    return " ".join(f"{weight:g}" for weight in weights)
