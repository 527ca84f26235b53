"""Whose a probe's folder is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from polyphony.curricula.files import replace_file
from polyphony.launch.recipe import Recipe, RecipeError, load_recipe
from polyphony.trainer.run.folder import RunFolder


def claim_probe(recipe: Recipe, out: Path) -> bool:
    """Make the probe's folder and return True, or check that what it holds is of the same recipe.

    What is measured beside its domains may have been added since; the folder's recipe then says so too.
    """
    folder = RunFolder(out)
    saved = folder.recipe
    if saved.is_file():
        if (before := load_recipe(saved)) != recipe:
            if _without_extras(before) != _without_extras(recipe):
                raise RecipeError(f"{out} holds a probe of another recipe; choose another --out")
            replace_file(saved, recipe.as_yaml())
        return False
    if out.is_dir() and any(out.iterdir()):
        raise RecipeError(f"folder {out} is not empty and holds no probe; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(saved, recipe.as_yaml())
    except OSError as error:
        raise RecipeError(f"folder {out} cannot be written: {error.strerror}") from error
    return True


def _without_extras(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"probe": replace(recipe.probe, joint_arm=False, merge=[], ways=[])})
