"""`polyphony sample`: what experts answer to the training prompts; what the domain's own reward accepts becomes rows.

`algorithm: sft` learns from the rows. What is accepted is said by the recipe's section `rft`: from which reward on, how many
of a prompt, and one alone of those that say the same. Held-out rows are never asked. A line a prompt goes to the ledger
`sampled`, from which an unfinished sample goes on; the rows are written from it at the end.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyphony.curricula.declarations import nearest
from polyphony.curricula.files import replace_file, replacing
from polyphony.curricula.monitors.entropy_control import EntropySettings
from polyphony.curricula.records import Completion, Group, Prompt
from polyphony.launch.build import build_trainer, check_names, grpo_config, load_data
from polyphony.launch.recipe import Recipe, RecipeError
from polyphony.launch.sections import CurriculumSection
from polyphony.launch.train import claim_folder
from polyphony.launch.verbs.evaluate import same_shape, weights_of
from polyphony.launch.verbs.screen import cut_torn_line, groups_of
from polyphony.rewards.partitions import find_partitioner
from polyphony.trainer.run import say
from polyphony.trainer.run.folder import RunFolder
from polyphony.trainer.run.json_lines import read_object
from polyphony.trainer.run.origins import origin_of, refuse_other_weights
from polyphony.trainer.sft.settings import SftSettings
from polyphony.trainer.teachers.context import OF_ATTEMPT, fields_of, in_context
from polyphony.trainer.teachers.settings import CURRENT, START, TeacherSettings
from polyphony.trainer.teachers.weights import TeacherWeights, as_checkpoint

if TYPE_CHECKING:
    from polyphony.trainer.domains import DomainData
    from polyphony.trainer.engine.engine import Engine
    from polyphony.trainer.grpo import DomainGRPOTrainer

SAMPLE_DRAW = -1_000_000
"""Stands for the draw in the seeds of experts' answers: training, evaluation and screening do not share them."""
SAMPLED = "sampled"
"""A sample's ledger."""


def sample(
    recipe: Recipe, out: Path, *, per_prompt: int, teachers: Sequence[str] = (), engine: Engine | None = None
) -> dict[str, Any]:
    """Sample into the folder `out`, or go on there; return the summary. `teachers` are `<domain>=<teacher>`.

    Raises RecipeError, before weights are loaded, for teachers that are not there, and for a folder of something else.
    """
    experts, folder = experts_of(recipe, teachers), RunFolder(out)
    check_names(recipe)
    lessons = _lessons(recipe, folder, experts, per_prompt)
    claim_folder(recipe, out, resume=folder.recipe.is_file())
    with folder.locked(say=say):
        told = {domain: asdict(expert.settings) for domain, expert in experts.items()}
        weights = {domain: origin_of(expert.weights.path or recipe.model) for domain, expert in experts.items()}
        _note(folder, {"per_prompt": per_prompt, "teachers": told}, weights)
        cut_torn_line(folder.ledger(SAMPLED))
        before = ""
        for lesson in lessons:
            shape = _lasting(lesson.weights, recipe)
            with as_checkpoint(lesson.weights, base=recipe.model, trusts_code=recipe.trusts_code) as model:
                if before and not same_shape(before, shape, trusts_code=recipe.trusts_code):
                    engine = None
                engine = lesson.run(model, engine)
                before = shape if engine is not None else ""
            gc.collect()  # the weights that were asked
        summary = read_object(folder.sampled) | {"domains": _counted(folder, experts)}
        replace_file(folder.sampled, json.dumps(summary, indent=1))
        _write_rows(folder)
    return summary


def _lasting(weights: TeacherWeights, recipe: Recipe) -> str:
    """Return the model with the shape and the tokenizer of the weights: an adapter's merged copy does not last."""
    return weights.path if weights.kind == "checkpoint" else recipe.model


@dataclass(frozen=True, kw_only=True, slots=True)
class Expert:
    """Who answers for a domain, and where the weights are."""

    settings: TeacherSettings
    weights: TeacherWeights


def experts_of(recipe: Recipe, given: Sequence[str]) -> dict[str, Expert]:
    """Return by domain who answers: as given, `<domain>=<teacher>`, else as the recipe says.

    A teacher is a name among the recipe's, or what a teacher's `model` may be, a run folder for its `final/`. Raises
    RecipeError.
    """
    asked = {name: domain.teacher for name, domain in recipe.domains.items() if domain.teacher is not None}
    for text in given:
        domain, equals, teacher = text.partition("=")
        if not equals or not teacher:
            raise RecipeError(f"--teachers {text}: expected <domain>=<teacher>")
        if domain not in recipe.domains:
            raise RecipeError(f"--teachers {text}: unknown domain {domain!r}; {nearest(domain, list(recipe.domains))}")
        asked[domain] = teacher
    if not asked:
        raise RecipeError("no domain has a teacher: give --teachers <domain>=<teacher>, or domains.<name>.teacher")
    return {domain: _expert(recipe, domain, teacher) for domain, teacher in asked.items()}


def _expert(recipe: Recipe, domain: str, teacher: str) -> Expert:
    where = f"teacher {teacher!r} of domain {domain!r}"
    if recipe.domains[domain].acts:
        raise RecipeError(f"{where}: the domain acts, over several turns, and what is sampled are answers of one")
    if recipe.domains[domain].is_watch_only:
        raise RecipeError(f"{where}: a watched domain has no training prompts to answer")
    try:
        settings = recipe.teachers.get(teacher) or TeacherSettings(model=teacher)
        if settings.endpoint or settings.model is None:
            raise ValueError("is behind an endpoint, which scores answers and gives none: name its weights")
        if reads := [name for name in fields_of(settings.context or "") if name in OF_ATTEMPT]:
            raise ValueError(
                f"its context reads {{{reads[0]}}}, and before its answer there is no attempt: leave it out"
            )
        if Path(settings.model).is_dir():
            settings = replace(settings, model=str(Path(weights_of(settings.model)).resolve()))
        weights = TeacherWeights.of(teacher, settings, base=recipe.model)
    except ValueError as error:
        raise RecipeError(f"{where}: {str(error).removeprefix(f'teachers.{teacher}.model: ')}") from error
    if settings.model in (CURRENT, START):
        weights = TeacherWeights("start")  # as long as nothing is trained, both are the recipe's model
    elif weights.kind == "checkpoint" and not Path(weights.path).is_dir():
        _check_hub(weights.path, where)
    return Expert(settings=settings, weights=weights)


def _check_hub(name: str, where: str) -> None:
    from transformers import AutoConfig  # slow to import

    try:
        AutoConfig.from_pretrained(name)
    except (ValueError, OSError) as error:
        raise RecipeError(f"{where}: {name} is no folder, and not found on the hub: {error}") from error


def _note(folder: RunFolder, asked: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    """Write down what is asked, and of which weights by domain; raise RecipeError where the folder's sample is another."""
    if not folder.sampled.is_file():
        replace_file(folder.sampled, json.dumps({**asked, "weights": weights}, indent=1))
        return
    then = read_object(folder.sampled)
    for key, now in asked.items():
        if then.get(key) != now:
            raise RecipeError(
                f"{folder.path} holds a sample with {key} {then.get(key)}, not {now}: choose another --out"
            )
    for domain, now in weights.items():
        try:
            began = then.get("weights", {}).get(domain, {})
            refuse_other_weights(began, f"the teacher of domain {domain!r}", folder=now["name"])
        except ValueError as error:
            raise RecipeError(f"{folder.path}: {error}") from error


def _lessons(recipe: Recipe, folder: RunFolder, experts: Mapping[str, Expert], per_prompt: int) -> list[Asking]:
    """Return what each expert's weights are asked; raises RecipeError for rows that one of them cannot be asked."""
    found = []
    for weights in dict.fromkeys(expert.weights for expert in experts.values()):
        asked = {domain: expert for domain, expert in experts.items() if expert.weights == weights}
        alone = asking(recipe, _lasting(weights, recipe), asked)
        data = load_data(alone, grpo_config(alone, folder.path))
        lesson = Asking(recipe=recipe, folder=folder, experts=asked, per_prompt=per_prompt, weights=weights, data=data)
        try:
            _check_room(data, lesson.read([prompt for name in asked for prompt in data.train[name]]))
        except ValueError as error:
            raise RecipeError(str(error)) from error
        found.append(lesson)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """The answers of one expert's weights, to the prompts of the domains that it answers for."""

    recipe: Recipe
    folder: RunFolder
    experts: Mapping[str, Expert]
    per_prompt: int
    weights: TeacherWeights
    data: DomainData

    def read(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the prompts as the expert reads them. Raises ValueError for a field of its context that a row lacks."""
        contexts = {name: expert.settings.context for name, expert in self.experts.items()}
        return [p if (context := contexts[p.domain]) is None else in_context(context, p) for p in prompts]

    def run(self, model: str, engine: Engine | None) -> Engine | None:
        """Ask for what the ledger does not hold, loading nothing for nothing; return the engine."""
        recipe, data = asking(self.recipe, model, self.experts), self.data
        known = {(line["domain"], line["id"]) for line in self.folder.read(SAMPLED)}
        prompts = [p for name in self.experts for p in data.train[name] if (name, p.id) not in known]
        if not prompts:
            return engine
        trainer = build_trainer(recipe, self.folder.path, engine=engine, data=data)
        if trainer.accelerator.num_processes > 1:
            raise RecipeError("sample runs in one process; give its engine more devices instead")
        self._ask(trainer, prompts, self.read(prompts))
        return trainer.policy.engine

    def _ask(self, trainer: DomainGRPOTrainer, prompts: Sequence[Prompt], read: Sequence[Prompt]) -> None:
        from polyphony.trainer.run.progress import ProgressLine  # slow to import

        size = max(1, int(trainer.args.generation_batch_size or 1) // self.per_prompt)
        label = f"{self.recipe.name}: prompts answered of {', '.join(self.experts)}"
        progress, begun, marks = ProgressLine(label, len(prompts)), time.monotonic(), trainer.data.marks
        for at in range(0, len(prompts), size):
            of_batch = slice(at, at + size)
            asked = trainer.data.tokenized(read[of_batch])
            draws = [SAMPLE_DRAW] * len(asked)
            groups = groups_of(trainer, asked, draws, self.per_prompt, graded_as=prompts[of_batch])
            told = zip(prompts[of_batch], groups, strict=True)
            self.folder.append(SAMPLED, *(self._line(trainer.data, prompt, of, marks) for prompt, of in told))
            progress.update(min(at + size, len(prompts)), {})
        progress.close()
        say(f"{len(prompts) * self.per_prompt} answers in {time.monotonic() - begun:.0f} s")

    def _line(
        self, data: DomainData, prompt: Prompt, answers: Sequence[Completion], marks: Sequence[str]
    ) -> dict[str, Any]:
        """Return a prompt's line of the ledger; what holds a mark of a chat template is no answer to learn from."""
        from polyphony.trainer.advantages import accepted  # slow to import

        rft = self.recipe.rft
        partitioner = None if rft.dedup is None else find_partitioner(rft.dedup)
        group = Group.of(answers, draw=SAMPLE_DRAW, compare="answers")
        begun = data.openings.get(prompt.domain, "")  # a thought that the template began is said with the rest
        marked = {i for i, answer in enumerate(answers) if any(mark in begun + answer.text for mark in marks)}
        clean = replace(group, rewards=tuple(None if i in marked else r for i, r in enumerate(group.rewards)))
        return {
            "domain": prompt.domain,
            "id": prompt.id,
            "prompt": data.train[prompt.domain].said(prompt.id)[1],
            "sampled": len(answers),
            "graded": len(group.graded),
            "tokens": sum(group.lengths),
            "marked": sum((r := group.rewards[i]) is not None and r >= rft.accept_from for i in marked),
            "accepted": [
                {"completion": begun + answers[i].text, "reward": answers[i].reward, "tokens": len(answers[i].ids)}
                | ({"truncated": True} if answers[i].truncated else {})
                for i in accepted(clean, rft, partitioner)
            ],
        }


def asking(recipe: Recipe, model: str, names: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a trainer that samples from a model and is not trained; only these domains are asked."""
    domains = {
        name: replace(domain, teacher=None, train=domain.train if name in names else None)
        for name, domain in recipe.domains.items()
        if not domain.acts
    }
    plain = {
        "curriculum": CurriculumSection(scheduler="joint"),
        "entropy": EntropySettings(),
        "pool": None,
        "lora": None,
    }
    plain |= {"algorithm": "sft", "sft": SftSettings(), "teachers": {}, "guard": None}
    return recipe.model_copy(update={"model": model, "domains": domains, **plain})


def _check_room(data: DomainData, read: Sequence[Prompt]) -> None:
    """Raise RecipeError for a prompt that does not fit into the expert's memory with its context."""
    for prompt in data.tokenized(read) if data.context is not None else ():
        if (n := len(prompt.ids) + data.limits[prompt.domain]) > data.context:  # type: ignore[operator]
            row = data.train[prompt.domain].row_of(prompt.id)
            raise RecipeError(
                f"{row}: {n} tokens with its teacher's context and answer, the teacher holds {data.context}"
            )


def _counted(folder: RunFolder, experts: Mapping[str, Expert]) -> dict[str, dict[str, Any]]:
    lines = folder.read(SAMPLED)
    found = {}
    for name, expert in experts.items():
        of = [line for line in lines if line["domain"] == name]
        sampled, accepted = sum(line["sampled"] for line in of), sum(len(line["accepted"]) for line in of)
        found[name] = {
            "prompts": len(of),
            "answered": sum(bool(line["accepted"]) for line in of),
            "sampled": sampled,
            "ungraded": sampled - sum(line["graded"] for line in of),
            "marked": sum(line.get("marked", 0) for line in of),
            "accepted": accepted,
            "share": accepted / max(1, sampled),
            "tokens": sum(line["tokens"] for line in of),
            "tokens_accepted": sum(answer["tokens"] for line in of for answer in line["accepted"]),
            "teacher": expert.settings.model,
        }
    return found


def _write_rows(folder: RunFolder) -> None:
    with replacing(folder.rows) as file:
        for line in folder.read(SAMPLED):
            for answer in line["accepted"]:
                row = {name: line[name] for name in ("domain", "id", "prompt")} | answer
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def sample_table(summary: Mapping[str, Any]) -> str:
    """Return the summary as text; tokens are those of all answers, as all were paid for."""
    columns = ("prompts", "answered", "sampled", "accepted", "share", "tokens")
    lines = [f"{'':<16}" + "".join(f"{name:>10}" for name in columns) + "   teacher"]
    for name, found in summary["domains"].items():
        cells = (f"{found[c]:>10.0%}" if c == "share" else f"{found[c]:>10,}" for c in columns)
        ungraded = f"; {found['ungraded']} could not be graded" if found["ungraded"] else ""
        marked = f"; {found['marked']} hold a mark of a chat template" if found["marked"] else ""
        lines.append(f"{name:<16}" + "".join(cells) + f"   {found['teacher']}{ungraded}{marked}")
    return "\n".join(lines)
