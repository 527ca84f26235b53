"""From the recipe's words to what is practised and how: the pool, the guard, the update."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyphony.launch.config import Recipe, RecipeError

if TYPE_CHECKING:
    from polyphony.curricula.pool_settings import PoolSettings
    from polyphony.trainer.advantages import UpdateSettings
    from polyphony.trainer.grpo import DomainGRPOTrainer


def pool_settings(recipe: Recipe) -> PoolSettings | None:
    """Return how the recipe's pool works; None where it has none.

    Raises RecipeError for an unknown sampling, or a file to start from that is not there.
    """
    from polyphony.curricula.pool_settings import PoolSettings
    from polyphony.curricula.posterior import Band

    section = recipe.pool
    if section is None:
        return None
    if section.start is not None and not Path(section.start).is_file():
        raise RecipeError(f"pool.from: file {section.start} does not exist; `polyphony screen` writes it")
    given = section.model_dump(exclude={"refill", "start", "impossible_below", "defer_below", "mastered_above"})
    band = Band(
        impossible_below=section.impossible_below,
        defer_below=section.defer_below,
        mastered_above=section.mastered_above,
    )
    try:
        return PoolSettings(band=band, refill_rounds=section.refill.max_rounds, **given)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def update_settings(recipe: Recipe) -> UpdateSettings:
    """Return how the recipe's rewards become an update."""
    from polyphony.trainer.advantages import Guard, UpdateSettings
    from polyphony.trainer.rft import RftSettings

    return UpdateSettings(
        advantages=recipe.advantages,
        guard=None if recipe.guard is None else Guard(**recipe.guard.model_dump()),
        rft=RftSettings(**recipe.rft.model_dump()) if recipe.algorithm == "rft" else None,
        drop_dead=recipe.update.drop_dead,
    )


def adopt_known(trainer: DomainGRPOTrainer, recipe: Recipe) -> str | None:
    """Start from what `pool.from` knows of the prompts; return what was found in words, None where nothing is named.

    Raises RecipeError for a file that cannot be read or knows none of these prompts.
    """
    from polyphony.curricula.pool_file import PoolFileError, load_pools

    if recipe.pool is None or recipe.pool.start is None:
        return None
    path = Path(recipe.pool.start)
    try:
        found = trainer.curriculum.adopt_pools(load_pools(path))
    except PoolFileError as error:
        raise RecipeError(f"pool.from: {error}") from error
    if not found:
        raise RecipeError(f"pool.from: {path} is of another data set: it knows none of the training prompts")
    return f"pool.from: {found} of {trainer.data.n_train} training prompts are known"


def own_pool(path: Path, prompts: Any) -> dict[str, Any] | None:
    """Return the pool at `path`, None where there is none; one that is damaged, or of other prompts, is moved aside.

    `prompts` are the ids of each domain.
    """
    from polyphony.curricula.pool_file import PoolFileError, load_pools, move_aside
    from polyphony.launch.train import say

    if not path.exists():
        return None
    try:
        saved = load_pools(path)
        if any(not set(saved[name].ids).isdisjoint(ids) for name, ids in prompts.items() if name in saved):
            return saved
        why = f"pool file {path} is of another data set: it knows none of these prompts"
    except PoolFileError as error:
        why = str(error)
    say(f"{why}; moved to {move_aside(path)}")
    return None
