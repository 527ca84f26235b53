"""`polyphony screen`: what can the present model learn from? Rollouts over the training prompts, before any training.

Sequential: every prompt gets one group; one that succeeded at all needs no more, one that never did is visited again until
it is IMPOSSIBLE with confidence or has had its most visits. What is known goes to `pool.npz`, which `pool.from` reads.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyphony.curricula.files import replace_file, replacing
from polyphony.curricula.prompts.estimate import State
from polyphony.curricula.prompts.pool import PoolSettings, PromptPool
from polyphony.curricula.prompts.pool_file import own_pool, save_pools
from polyphony.curricula.records import Completion, Prompt
from polyphony.launch.build import build_trainer, untaught
from polyphony.launch.recipe import Recipe, RecipeError
from polyphony.launch.train import claim_folder
from polyphony.trainer.run import say
from polyphony.trainer.run.folder import RunFolder

if TYPE_CHECKING:
    from polyphony.trainer.engine.engine import InProcessEngine
    from polyphony.trainer.grpo import DomainGRPOTrainer

SCREEN_DRAW = -2
"""Stands for the draw in the seeds of screening, visit by visit downwards: training and evaluation do not share them."""

ANSWERS, IMPOSSIBLE = "answers", "impossible"
"""A screen's ledgers."""
SAVE_EVERY_S = 20.0
SHOWN_ANSWERS = 5
"""Different answers listed for each impossible prompt, the most frequent first."""


def screen(
    recipe: Recipe, out: Path, *, most_visits: int = 12, engine: InProcessEngine | None = None
) -> dict[str, Any]:
    """Screen a recipe's training prompts into the folder `out`, or go on there; return the summary.

    Raises RecipeError for a folder that holds something else.
    """
    pool = replace(recipe.pool or PoolSettings(), start=None)
    recipe = recipe.model_copy(update={"pool": pool})  # that file is made here
    folder = RunFolder(out)
    claim_folder(recipe, out, resume=folder.recipe.is_file())
    with folder.locked(say=say):
        trainer = build_trainer(untaught(recipe), out, engine=engine)
        if trainer.accelerator.num_processes > 1:
            raise RecipeError("screen runs in one process; give its engine more devices instead")
        screening = Screening(trainer=trainer, folder=folder, most_visits=most_visits)
        screening.resume()
        screening.run(recipe.name)
        summary = {"domains": {name: describe(pool) for name, pool in trainer.curriculum.pools.items()}}
        replace_file(folder.screened, json.dumps(summary, indent=1))
        screening.write_impossible()
    return summary


@dataclass(kw_only=True, slots=True)
class Screening:
    """Visits under way.

    Example: `Screening(trainer=trainer, folder=RunFolder(Path("runs/x-screen")), most_visits=12).run("x")`
    """

    trainer: DomainGRPOTrainer
    folder: RunFolder
    most_visits: int
    """Of a prompt that never succeeded."""
    ungraded: set[tuple[str, str]] = field(default_factory=set)
    """Prompts whose reward failed on a whole group: not tried again by this process."""

    @property
    def pools(self) -> dict[str, PromptPool]:
        return self.trainer.curriculum.pools

    def resume(self) -> None:
        """Take over what an earlier screening in this folder learned; an answer that it was writing is cut off."""
        cut_torn_line(self.folder.ledger(ANSWERS))
        prompts = {name: pool.ids for name, pool in self.pools.items()}
        if saved := own_pool(self.folder.pool, prompts, say=say):
            self.trainer.curriculum.adopt_pools(saved)
            visited = sum(int((pool.visits > 0).sum()) for pool in self.pools.values())
            say(f"going on: {visited} of {self.trainer.data.n_train} prompts were visited before")

    def run(self, label: str) -> None:
        """Visit prompts until none is open; save on the way."""
        from polyphony.trainer.run.progress import ProgressLine  # slow to import

        total = sum(len(pool.ids) for pool in self.pools.values())
        progress, saved_at = ProgressLine(f"{label}: prompts settled", total), time.monotonic()
        size = max(1, int(self.trainer.args.generation_batch_size or 1) // self.group_size)
        while unsettled := self._unsettled():
            settled = total - len(unsettled)
            for start in range(0, len(unsettled), size):
                batch = unsettled[start : start + size]
                self._visit(batch)
                settled += sum(self._is_settled(name, prompt_id) for _, name, prompt_id in batch)
                progress.update(settled, {})
                if time.monotonic() - saved_at > SAVE_EVERY_S:
                    self._save()
                    saved_at = time.monotonic()
        progress.close()
        self._save()

    def write_impossible(self) -> None:
        """List the impossible prompts with what the model answered: wrong references dominate there."""
        heard = self._answers()
        with replacing(self.folder.ledger(IMPOSSIBLE)) as file:
            for name, pool in self.pools.items():
                for prompt_id in (i for i in pool.ids if pool.state_of(i) is State.IMPOSSIBLE):
                    prompt = self.trainer.data.train[name][prompt_id]
                    answers = heard.get((name, prompt_id), Counter()).most_common(SHOWN_ANSWERS)
                    line = {"domain": name, "id": prompt_id, "prompt": prompt.prompt}
                    line |= {"reference": prompt.columns.get("answer"), "answers": answers}
                    file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")

    @property
    def group_size(self) -> int:
        return int(self.trainer.num_generations)

    def _unsettled(self) -> list[tuple[int, str, str]]:
        """Return (visits, domain, id) of the prompts that need a further visit, those with the fewest first."""
        return sorted(
            (int(pool.visits[place]), name, str(pool.ids[place]))
            for name, pool in self.pools.items()
            for place in np.flatnonzero(self._is_open(pool, slice(None))).tolist()
            if (name, pool.ids[place]) not in self.ungraded
        )

    def _is_open(self, pool: PromptPool, places: Any) -> np.ndarray:
        """Return whether the prompts at these places never succeeded and may still be visited."""
        visits = pool.visits[places]
        hopes = (pool.successes[places] == 0) & (pool.state[places] != State.IMPOSSIBLE) & (visits < self.most_visits)
        return (visits == 0) | hopes

    def _is_settled(self, name: str, prompt_id: str) -> bool:
        pool = self.pools[name]
        return (name, prompt_id) in self.ungraded or not self._is_open(pool, pool.place_of(prompt_id))

    def _visit(self, batch: Sequence[tuple[int, str, str]]) -> None:
        trainer, size = self.trainer, self.group_size
        asked = trainer.data.tokenized(trainer.data.train[name][prompt_id] for _, name, prompt_id in batch)
        draws = [SCREEN_DRAW - visits for visits, _, _ in batch]
        for (visits, _, _), prompt, answers in zip(batch, asked, groups_of(trainer, asked, draws, size), strict=True):
            graded = [c.reward for c in answers if c.reward is not None]
            if not graded:
                self.ungraded.add((prompt.domain, prompt.id))
            self.pools[prompt.domain].observe(prompt.id, graded)
            if graded and max(graded) <= 0:
                line = {"domain": prompt.domain, "id": prompt.id, "visit": visits}
                self.folder.append(ANSWERS, line | {"answers": [c.text.strip() for c in answers]})

    def _answers(self) -> dict[tuple[str, str], Counter]:
        """Return how often each answer was given to each prompt that failed; a visit made twice counts once."""
        heard: dict[tuple[str, str], dict[int, list[str]]] = {}
        for line in self.folder.read(ANSWERS):
            heard.setdefault((line["domain"], line["id"]), {})[line["visit"]] = line["answers"]
        return {key: Counter(a for answers in visits.values() for a in answers) for key, visits in heard.items()}

    def _save(self) -> None:
        save_pools(self.folder.pool, self.trainer.curriculum.pool_columns())


def groups_of(
    trainer: DomainGRPOTrainer,
    asked: Sequence[Prompt],
    draws: Sequence[int],
    size: int,
    *,
    graded_as: Sequence[Prompt] | None = None,
) -> list[list[Completion]]:
    """Return `size` graded answers to each prompt; `draws` stand for the draw in the seeds.

    `graded_as` are the prompts as the reward gets them, where the model was asked with more in them.
    """
    from polyphony.trainer.engine.vllm import Request, completion_seed  # slow to import

    places = [k for k in range(len(asked)) for _ in range(size)]
    requests = [
        Request(
            prompt_ids=asked[k].ids,
            seed=completion_seed(trainer.args.seed, draws[k], asked[k].id, 0, i % size),
            max_tokens=trainer.data.limits[asked[k].domain],
        )
        for i, k in enumerate(places)
    ]
    complete = trainer.policy.complete
    if trainer.episodes is not None:
        complete = partial(trainer.episodes.complete, [asked[k] for k in places])
    said = complete(requests, size)
    read = trainer.policy.read([(graded_as or asked)[k] for k in places], said)
    graded = [replace(c, reward=reward) for c, reward in zip(read, trainer.scorer(read), strict=True)]
    return [graded[k * size : (k + 1) * size] for k in range(len(asked))]


def cut_torn_line(path: Path) -> None:
    """Take away the beginning of a line that a process was writing when it was killed."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def describe(pool: PromptPool) -> dict[str, Any]:
    """Return the counts of a domain and the histogram of its pass rates in tenths, prompts visited only."""
    counts, seen = pool.counts(), pool.visits > 0
    graded = (pool.successes + pool.failures)[seen]
    rates = pool.successes[seen] / np.maximum(graded, 1e-9)
    return {
        "prompts": len(pool.ids),
        "keep": counts[State.ACTIVE],
        "mastered": counts[State.MASTERED],
        "defer": counts[State.DEFERRED],
        "drop": counts[State.IMPOSSIBLE],
        "ungraded": counts[State.UNSEEN],
        "visits": int(pool.visits.sum()),
        "histogram": np.histogram(rates, bins=10, range=(0.0, 1.0))[0].tolist(),
    }


def screen_table(summary: dict[str, Any]) -> str:
    """Return the summary as text: counts of each domain, and its histogram as bars."""
    columns = ("prompts", "keep", "mastered", "defer", "drop", "ungraded", "visits")
    lines = [f"{'':<16}" + "".join(f"{name:>10}" for name in columns) + "   pass rate 0 .. 1"]
    for name, found in summary["domains"].items():
        tallest = max(1, *found["histogram"])
        bars = "".join(" ▁▂▃▄▅▆▇█"[-(-8 * n // tallest)] for n in found["histogram"])
        lines.append(f"{name:<16}" + "".join(f"{found[column]:>10}" for column in columns) + f"   |{bars}|")
    return "\n".join(lines)
