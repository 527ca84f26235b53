"""`polyphony eval`: score any checkpoint on a recipe's held-out sets."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from launch.config import Recipe


def evaluate(recipe: Recipe, model: str, *, as_json: bool) -> None:
    """Print, for each domain, the mean score with its 95 % interval, pass@k and entropy; both halves of the items."""
    results = evaluate_model(recipe, model)
    if as_json:
        print(json.dumps(results))
        return
    print(
        f"{'domain':<16}{'items':>6}{'score':>8}  {'95 % interval':<18}{'pass@' + str(recipe.eval.samples):>8}{'entropy':>9}"
    )
    for name, r in results.items():
        low, high = r["interval"]
        interval = f"[{low:.3f}, {high:.3f}]"
        print(f"{name:<16}{r['items']:>6}{r['score']:>8.3f}  {interval:<18}{r['pass_at_k']:>8.3f}{r['entropy']:>9.3f}")


def evaluate_model(recipe: Recipe, model: str) -> dict[str, dict]:
    """Return the held-out numbers of a model, by domain."""
    from curricula.records import mean
    from launch.train import build_trainer

    local = Path(model)
    recipe = recipe.model_copy(update={"model": str(local.resolve()) if local.is_dir() else model})
    with tempfile.TemporaryDirectory() as scratch:
        result = build_trainer(recipe, Path(scratch)).evaluate_heldout()
    passed, scores = result.passed(), result.scores()
    return {
        name: {
            "items": len(items),
            "score": mean(items),
            "interval": _interval(items),
            "pass_at_k": mean(passed[name]),
            "entropy": result.entropy[name],
        }
        for name, items in scores.items()
    }


def _interval(items: tuple[float, ...]) -> list[float]:
    """95 % bootstrap interval of the mean over items."""
    import numpy as np

    rng = np.random.default_rng(0)
    means = rng.choice(np.asarray(items), size=(10_000, len(items))).mean(axis=1)
    return [float(q) for q in np.quantile(means, [0.025, 0.975])]
