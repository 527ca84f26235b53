"""A recipe of `algorithm: sft` becomes a trainer: prompts and answers checked first, weights loaded last.

What needs torch or TRL is imported inside functions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from polyphony.launch.build import build_trainer, grpo_config, load_data, refusal
from polyphony.launch.recipe import Recipe, RecipeError
from polyphony.trainer.run import say
from polyphony.trainer.sft.settings import answers_file

if TYPE_CHECKING:
    from polyphony.curricula.records import Completion
    from polyphony.trainer.domains import DomainData
    from polyphony.trainer.engine.engine import Engine
    from polyphony.trainer.run.folder import RunFolder
    from polyphony.trainer.sft.trainer import DomainSFTTrainer


def build_sft(
    recipe: Recipe, output: Path, *, engine: Engine | None = None, run: RunFolder | None = None
) -> DomainSFTTrainer:
    """Return the trainer of a recipe, as `build_trainer` does for other algorithms. Raises RecipeError."""
    args = grpo_config(recipe, output)
    answers_file(str(recipe.sft.answers))
    data = load_data(recipe, args)
    answers = load_answers(recipe, data)

    from polyphony.trainer.run.outset import Outset
    from polyphony.trainer.sft.passes import plan_passes
    from polyphony.trainer.sft.rows import tables_of
    from polyphony.trainer.sft.trainer import DomainSFTTrainer

    data, plan = replace(data, answers=tables_of(answers)), plan_passes(args, len(answers))
    try:
        outset = Outset.of(run, recipe.of_trainer, args=args, plan=plan, data=data, model=recipe.model)
        sampler = build_trainer(recipe, output, engine=engine, data=data)
        return DomainSFTTrainer(sampler, answers, args=args, outset=outset)
    except (ValueError, OSError) as error:
        raise refusal(error) from error


def load_answers(recipe: Recipe, data: DomainData) -> list[Completion]:
    """Return the answers that a recipe learns from, tokenized; says which trained domains have none. Raises RecipeError."""
    from polyphony.trainer.sft.rows import read_answers

    try:
        answers = read_answers(str(recipe.sft.answers), data)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    for name in sorted({*data.train} - {answer.prompt.domain for answer in answers}):
        say(f"sft.answers: none of domain {name!r}: nothing of it is learned")
    return answers
