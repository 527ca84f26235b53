"""Distillation: what a step costs with a teacher of the policy's size and one completion a prompt, against a GRPO step."""

from __future__ import annotations

import tempfile
from pathlib import Path

from polyphony.launch.measures.result import Result, Target, Timing, in_turns, paired
from polyphony.launch.recipe import load_recipe
from tests.benchmarks.commands import RECIPES
from tests.benchmarks.training import step_recipe

PAIRS = 3


def bench_distil(*, short: bool = False) -> list[Result]:
    """Time steps of both algorithms on as many completions, in turns, by the tokens that they generated.

    No row is left out of either update: the policy is its own teacher here, and has advantages that are all but zero.
    """
    from polyphony.launch.measures.side_by_side import Block, SideBySide, lab_engine

    demo = load_recipe(RECIPES / "demo.yaml")
    trained = [name for name, section in demo.domains.items() if section.train is not None]
    alike = ["update.drop_dead=never", "grpo.loss_type=grpo"]
    taught = ["algorithm=distil", "grpo.num_generations=1", f"teachers={{twin: {{model: {demo.model!r}}}}}"]
    taught += [*(f"domains.{name}.teacher=twin" for name in trained), *(f"domains.{n}.diversity=null" for n in trained)]

    def of_tokens(block: Block) -> Timing:
        return Timing(1000 * block.seconds / block.tokens, 1000 * block.cpu_seconds / block.tokens)

    with tempfile.TemporaryDirectory() as folder:
        distil, grpo = (
            SideBySide(
                recipe=step_recipe(*alike, *more, short=short),
                engine=lab_engine(),
                folder=Path(folder) / name,
            )
            for name, more in (("distil", taught), ("grpo", []))
        )
        pairs = in_turns(distil.ours, grpo.ours, pairs=1 if short else PAIRS)
    return [
        paired(
            "step of distillation, one completion a prompt",
            "s/1,000 tokens",
            [(of_tokens(ours), of_tokens(plain)) for ours, plain in pairs],
            target=Target(relation="<=", limit=1.6),
            note=f"{pairs[-1][0].tokens:.0f} and {pairs[-1][1].tokens:.0f} tokens a step",
        )
    ]


BENCHMARKS = {"distil": bench_distil}
