"""The runs that a probe is made of: what each trains on, in which order, and at which cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from polyphony.curricula.monitors.entropy_control import EntropySettings
from polyphony.curricula.transfer.options import PUPIL
from polyphony.launch.recipe import Recipe
from polyphony.launch.sections import CurriculumSection


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One short run from the start: on one domain, or on all of them; `trained` empty measures the start itself."""

    trained: tuple[str, ...]
    steps: int
    seed: int
    is_placebo: bool = False
    rate: float | None = None
    """Learning rate, where it is not the recipe's: such an arm has a file of its own."""
    kind: str = ""
    """`sequence`, `groups`, `merge` or `distil`: another way to one model of all domains than to train on all at once."""
    method: str = ""
    """Of a merge."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from the others of a probe."""
        return self.rate, self.trained, self.seed, self.is_placebo, self.kind, self.method

    @property
    def label(self) -> str:
        if not self.trained or self.kind:
            return f"{self.kind} {self.method}".strip() or "start"
        name = self.trained[0] if len(self.trained) == 1 else "joint"
        return name + (", placebo" if self.is_placebo else "") + (f", at {self.rate:g}" if self.rate else "")


def plan_arms(recipe: Recipe, names: list[str]) -> list[Arm]:
    """Return every run of the probe: per seed the start, each domain alone, its placebo, and all domains for the same total;
    then what is tried at other learning rates."""
    base_seed = int(recipe.grpo.get("seed", 42))
    arms = []
    for seed in range(base_seed, base_seed + recipe.probe.seeds):
        arms.append(Arm(trained=(), steps=0, seed=seed))
        arms.extend(_alone(recipe, names, seed))
        if recipe.probe.joint_arm:
            arms.append(Arm(trained=tuple(names), steps=recipe.probe.steps * len(names), seed=seed))
        arms.extend(_merges(recipe, names, seed))
    for kind in recipe.probe.ways:  # what they are is known once all domains were probed
        steps = recipe.probe.steps * len(names)
        steps = max(1, round(PUPIL * steps)) if kind == "distil" else steps
        seeds = range(base_seed, base_seed + recipe.probe.seeds)
        arms.extend(Arm(trained=tuple(names), steps=steps, seed=seed, kind=kind) for seed in seeds)
    for rate in other_rates(recipe):
        arms.extend(_alone(recipe, names, base_seed, rate))
    return arms


def _merges(recipe: Recipe, names: list[str], seed: int) -> list[Arm]:
    methods = dict.fromkeys(recipe.probe.merge if recipe.probe.keep else ())
    return [Arm(trained=tuple(names), steps=0, seed=seed, kind="merge", method=method) for method in methods]


def _alone(recipe: Recipe, names: list[str], seed: int, rate: float | None = None) -> list[Arm]:
    """Return the runs of each domain alone, then their placebos if these are asked for."""
    kinds = (False, True) if recipe.probe.placebo else (False,)
    steps = recipe.probe.steps
    return [Arm(trained=(n,), steps=steps, seed=seed, is_placebo=kind, rate=rate) for kind in kinds for n in names]


def other_rates(recipe: Recipe) -> list[float]:
    """Return the learning rates to be tried beside the recipe's own, the lowest first."""
    return sorted(set(recipe.probe.learning_rates) - {recipe.grpo.get("learning_rate")})


def tokens(recipe: Recipe, arms: list[Arm], *, items: int) -> tuple[int, int]:
    """Return the most tokens that the runs generate to train on, and to evaluate; `items` are held out, in all domains."""
    grpo = recipe.grpo
    batch = int(grpo.get("per_device_train_batch_size", 8)) * int(grpo.get("gradient_accumulation_steps", 1))
    lengths = [domain.max_completion_length or 0 for domain in recipe.domains.values()]
    length = max(int(grpo.get("max_completion_length", 256)), *lengths)
    samples = recipe.eval.samples + int(recipe.eval.greedy)
    trained = _steps(recipe, arms) * max(batch, int(grpo.get("generation_batch_size") or batch)) * length
    return trained, len(arms) * items * samples * length


def _steps(recipe: Recipe, arms: list[Arm]) -> int:
    steps = sum(arm.steps for arm in arms)
    if recipe.probe.start.startswith("joint:"):
        steps += int(recipe.probe.start.removeprefix("joint:")) * len({arm.seed for arm in arms})
    return steps


def cost(recipe: Recipe, arms: list[Arm], *, items: int) -> str:
    """Return an upper bound of what the runs will generate, in words; `items` are held out, in all domains together."""
    steps, samples = _steps(recipe, arms), recipe.eval.samples + int(recipe.eval.greedy)
    trained, evaluated = tokens(recipe, arms, items=items)
    return (
        f"{steps} optimizer steps and {len(arms)} evaluations: "
        f"at most {trained / 1e6:.2g} million rollout tokens to train on, "
        f"and {evaluated / 1e6:.2g} million to evaluate {items} held-out items, {samples} times each"
    )


def restricted(recipe: Recipe, arm: Arm, model: str, *, stages: Sequence[Sequence[str]] = ()) -> Recipe:
    """Return the recipe of one run: the other domains are only watched; shares are equal, whatever the scheduler, or go by
    `stages`.

    Entropy is not controlled, and no prompt is known from before: what training does by itself is what a probe measures.
    """
    domains = {
        name: section if name in arm.trained or not arm.trained else replace(section, train=None)
        for name, section in recipe.domains.items()
    }
    grpo = {**recipe.grpo, "max_steps": max(arm.steps, 1), "seed": arm.seed, "save_strategy": "no"}
    grpo |= {} if arm.rate is None else {"learning_rate": arm.rate}
    pool = recipe.pool and replace(recipe.pool, start=None)
    curriculum = CurriculumSection(scheduler="joint")
    if stages:
        curriculum = CurriculumSection(scheduler="sequential", order=[list(s) for s in stages])  # type: ignore[call-arg]
    plain = {"curriculum": curriculum, "entropy": EntropySettings(), "pool": pool}
    return recipe.model_copy(update={"domains": domains, "model": model, "grpo": grpo, **plain})
