"""`polyphony eval`: score any checkpoint on a recipe's held-out sets, or compare two on the same items and seeds."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyphony.curricula.records import graded, mean
from polyphony.launch.recipe import Recipe, RecipeError, load_recipe, recipe_of_run
from polyphony.launch.verbs.tables import changes_table, statistics_table
from polyphony.trainer.evaluation.statistics import as_lists, compare
from polyphony.trainer.run import say
from polyphony.trainer.run.folder import RunFolder

if TYPE_CHECKING:
    from polyphony.curricula.intervals import Interval
    from polyphony.trainer.engine.engine import Engine
    from polyphony.trainer.evaluation.result import HeldoutResult
    from polyphony.trainer.grpo import DomainGRPOTrainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What one call of the verb asks for."""

    models: tuple[str, ...]
    """One, or two to compare."""
    recipe: Recipe


def parse(names: Sequence[str], overrides: Sequence[str] = ()) -> Asked:
    """Tell models, recipe and overrides apart: `MODEL [MODEL] [RECIPE.yaml] [key.path=value ..]`.

    A run folder stands for its `final/`, and a model inside a run folder brings that run's recipe. Raises RecipeError.
    """
    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    models = [name for name in names if "=" not in name and name not in files]
    overrides = [*(name for name in names if "=" in name), *overrides]
    if len(files) > 1 or not 1 <= len(models) <= 2:
        raise RecipeError(f"expected one or two models and one recipe, got {', '.join(models + files) or 'nothing'}")
    run = next(filter(None, map(_run_of, models)), None)
    if files:
        recipe = load_recipe(files[0], overrides)
    elif run is not None:
        recipe = recipe_of_run(run, overrides, needs=("domains.", "model", "processing_class"))
    else:
        raise RecipeError(f"give a recipe: {models[0]} is not inside a run folder")
    return Asked(models=tuple(map(weights_of, models)), recipe=recipe)


def evaluate(question: Asked) -> list[HeldoutResult]:
    """Return what each of the models does on the held-out sets."""
    results, engine = [], None
    for model in question.models:
        if engine is not None and not same_shape(*question.models, trusts_code=question.recipe.trusts_code):
            engine = None
        result, engine = evaluate_model(question.recipe, model, engine=engine)
        results.append(result)
    return results


OVER = "scores are over all held-out items; a run's report has those over the half that decided nothing in it"


def results_table(question: Asked, results: Sequence[HeldoutResult]) -> str:
    """Return every statistic of every domain with its 95 % interval, over all held-out items; for two models, the paired
    differences and whether they exclude zero."""
    if len(results) == 2:
        first, second = question.models
        head = f"{second} minus {first}, paired by item; * where the 95 % interval excludes zero (each by itself)"
        return "\n".join([head, changes_table(compare_results(*results)), *_gaps(*results), OVER])
    answers = {name: results[0].read(name) for name in results[0].answers}
    styles = [
        f"{name}: {len(read.sampled)} items; style " + ", ".join(f"{s} {p:.0%}" for s, p in read.styles().items())
        for name, read in answers.items()
    ]
    table = statistics_table({name: read.intervals() for name, read in answers.items()})
    return "\n".join([table, *styles, OVER])


def results_as_json(question: Asked, results: Sequence[HeldoutResult]) -> dict[str, Any]:
    """Return the same numbers as plain JSON: of one model by domain, of two as `a`, `b` and their `difference`."""
    sides = [{name: _as_dict(result, name) for name in result.answers} for result in results]
    if len(sides) == 1:
        return sides[0]
    differences = {
        name: {
            statistic: {"interval": [*i], "excludes_zero": i.is_above_zero or i.is_below_zero}
            for statistic, i in rows.items()
            if math.isfinite(i.low)
        }
        for name, rows in compare_results(*results).items()
    }
    models = dict(zip("ab", question.models, strict=True))
    return {"models": models, **dict(zip("ab", sides, strict=True)), "difference": differences}


def evaluate_model(recipe: Recipe, model: str, *, engine: Engine | None = None) -> tuple[HeldoutResult, Engine | None]:
    """Return what a model does on a recipe's held-out sets, and the engine for a next model of the same shape.

    Where the model is not the recipe's own, KL(model || recipe's model) is measured on the model's completions.
    """
    from polyphony.launch.build import build_trainer, untaught  # slow to import

    greedy = recipe.rollouts.engine != "transformers" and not recipe.grpo.get("use_vllm")
    settings = replace(recipe.eval, greedy=greedy)
    local = Path(model)
    name = str(local.resolve()) if local.is_dir() else model
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(
            untaught(recipe).model_copy(update={"model": name, "eval": settings}), Path(scratch), engine=engine
        )
        result = trainer.evaluator.run()
    if name != recipe.model and settings.kl_items:
        result = replace(result, base_kl=_distance(trainer, recipe.model, trusts_code=recipe.trusts_code))
    return result, trainer.policy.engine


def compare_results(first: HeldoutResult, second: HeldoutResult) -> dict[str, dict[str, Interval]]:
    """Return, per domain and statistic, second minus first with its paired interval."""
    return {name: compare(first.read(name), second.read(name)) for name in first.answers}


def _gaps(first: HeldoutResult, second: HeldoutResult) -> list[str]:
    """Return a line for each domain of which not all items have a score on both sides."""
    known = {name: first.read(name).graded_with(second.read(name)) for name in first.answers}
    return [
        f"{name}: {n} of {len(first.items[name])} items were graded on both sides"
        for name, n in known.items()
        if n < len(first.items[name])
    ]


def _distance(
    trainer: DomainGRPOTrainer, base: str, *, trusts_code: bool = False
) -> dict[str, dict[str, tuple[float, int]]]:
    """Return (nats, tokens) of KL(policy || base) by domain and item; nothing, said on stderr, where the two speak other
    tokens."""
    from transformers import AutoModelForCausalLM  # slow to import
    from trl.trainer.utils import add_fused_lm_head

    model = AutoModelForCausalLM.from_pretrained(base, dtype=trainer.model.dtype, trust_remote_code=trusts_code)
    theirs, ours = (m.config.get_text_config().vocab_size for m in (model, trainer.model))
    if theirs != ours:
        say(f"polyphony eval: no KL: {base} has {theirs} tokens, the model {ours}")
        return {}
    add_fused_lm_head(model, temperature=trainer.temperature, outputs=("log_probs", "entropy"))
    model.to(trainer.accelerator.device).eval()
    return trainer.evaluator.distance_to(lambda prompts, ids: trainer.policy.logps(prompts, ids, model=model))


def _as_dict(result: HeldoutResult, name: str) -> dict[str, Any]:
    read = result.read(name)
    statistics = as_lists(read.intervals())
    low, score, high = statistics.get("score", (None, None, None))  # none where no item could be graded
    return {
        "items": len(result.items[name]),
        "score": score,
        "interval": [low, high],
        "pass_at_k": mean(graded(result.passed()[name])),
        "entropy": result.entropy[name],
        "statistics": statistics,
        "styles": read.styles(),
    }


def same_shape(first: str, second: str, *, trusts_code: bool) -> bool:
    """Say whether one engine can serve both models: the same architecture and sizes."""
    from transformers import AutoConfig  # slow to import

    apart = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype")
    sizes = [AutoConfig.from_pretrained(model, trust_remote_code=trusts_code).to_dict() for model in (first, second)]
    return all(sizes[0].get(k) == sizes[1].get(k) for k in sizes[0] | sizes[1] if k not in apart)


def _run_of(model: str) -> RunFolder | None:
    """Return the run folder that a model is, or lies in; None outside of one."""
    folder = Path(model)
    runs = (RunFolder(place) for place in (folder, folder.parent, folder.parent.parent) if folder.is_dir())
    return next((run for run in runs if run.recipe.is_file() or run.settings.is_file()), None)


def weights_of(model: str) -> str:
    """Return the folder of the weights where a run folder is named."""
    folder = RunFolder(Path(model))
    if not (folder.recipe.is_file() or folder.holds_run):
        return model
    if not folder.final.is_dir():
        raise RecipeError(f"run {model} has no {folder.final.name}/ yet: name one of its {folder.checkpoints.name}/")
    return str(folder.final)
