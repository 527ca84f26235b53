"""The recipe: YAML 1.2 in, checked and frozen; every error names the full key and the nearest one that exists.

No torch, no TRL: a recipe is checked in milliseconds, `grpo.*` against the committed list of TRL's fields.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator
from ruamel.yaml import YAML

from polyphony.curricula.declarations import keys_at, nearest, shortened
from polyphony.curricula.monitors.entropy_control import EntropySettings
from polyphony.curricula.monitors.guardrails import Guardrail
from polyphony.curricula.prompts.pool import PoolSettings
from polyphony.curricula.records import AdvantageKind
from polyphony.launch.grpo_fields import GONE, GROUP_SIZE, GRPO_KINDS, MEANT, OURS, complaint
from polyphony.launch.import_paths import look_in, renamed
from polyphony.launch.mistakes import UNSAID, valid_part
from polyphony.launch.sections import (
    AdapterSection,
    AlarmsSection,
    ClusterSection,
    CurriculumSection,
    LoraSection,
    ProbeSection,
    RecipeDomain,
    RolloutsSection,
    TrackingSection,
)
from polyphony.launch.yaml_text import read_value, read_yaml
from polyphony.trainer.arguments import UNHEARD, complaints
from polyphony.trainer.environments.settings import EnvironmentSettings
from polyphony.trainer.guarded import check_ahead
from polyphony.trainer.run.folder import RunFolder
from polyphony.trainer.run.json_lines import read_object
from polyphony.trainer.settings import (
    CheckpointSettings,
    DataSettings,
    EvaluationSettings,
    FaultSettings,
    Guard,
    RftSettings,
    RowSettings,
    TrainerSettings,
    UpdateSettings,
)
from polyphony.trainer.sft.settings import SECTIONS, SftSettings, check_sft
from polyphony.trainer.teachers.settings import CURRENT, START, DistilSettings, TeacherSettings

KEY = {"domains": "name", "guardrails": "domain"}
"""Sections by name, and the field that each one's key stands for."""


class RecipeError(ValueError):
    """A recipe that cannot be run, in one line; `problems` has all that was found, a line each."""

    def __init__(self, *problems: str, rest: Recipe | None = None) -> None:
        super().__init__(problems[0])
        self.problems = problems
        self.rest = rest
        """The recipe without what is wrong with it, so that the rest can be checked; None where nothing is left."""


class Recipe(BaseModel):
    """One run, whole: settings that are declared where they act.

    Example: `load_recipe("launch/recipes/debug.yaml", ["grpo.max_steps=4"]).domains["arithmetic"].kind`
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    """Of the run: its folder is `runs/<name>`."""
    model: str
    """A name on the Hugging Face hub, or a folder; a relative one is looked for beside the recipe first."""
    algorithm: Literal["grpo", "rft", "distil", "sft"] = "grpo"
    """`rft` is rejection-sampling fine-tuning; reinforcement fine-tuning on filtered prompts is `grpo` with `pool`. `distil`
    is on-policy distillation from `teachers`, `sft` fine-tuning on a file of answers."""
    advantages: AdvantageKind = UpdateSettings().advantages
    """How the rewards of a group become advantages, in domains that do not say: `group` is (r - mean) / std as in TRL,
    `mean_only` is r - mean."""
    domains: dict[str, RecipeDomain] = Field(min_length=1)
    """A domain's key is its name, which stands in metric keys: no spaces, slashes, quotes or brackets."""
    curriculum: CurriculumSection = CurriculumSection()
    pool: PoolSettings | None = None
    """`pool: {}` turns it on; without it every prompt is drawn once a pass."""
    guard: Guard | None = None
    """`guard: {}` turns it on."""
    rft: RftSettings = RftSettings()
    distil: DistilSettings = DistilSettings()
    sft: SftSettings = SftSettings()
    teachers: dict[str, TeacherSettings] = Field(default_factory=dict)
    """Used by `algorithm: distil` and by `polyphony sample`; a domain names its own as `domains.<name>.teacher`. One that no
    domain names is not loaded."""
    update: RowSettings = RowSettings()
    rollouts: RolloutsSection = RolloutsSection()
    environments: EnvironmentSettings = EnvironmentSettings()
    eval: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    data: DataSettings = DataSettings()
    grpo: dict[str, Any] = Field(default_factory=dict)
    """Fields of TRL's GRPOConfig, handed over untouched: `learning_rate`, `max_steps`, `num_generations`, `beta`, .."""
    entropy: EntropySettings = EntropySettings()
    guardrails: dict[str, Guardrail] = Field(default_factory=dict)
    """Tested at every held-out evaluation."""
    faults: FaultSettings = FaultSettings()
    cluster: ClusterSection = ClusterSection()
    lora: LoraSection | None = None
    adapter: AdapterSection | None = None
    """Instead of `lora`."""
    probe: ProbeSection = ProbeSection()
    tracking: TrackingSection = TrackingSection()
    alarms: AlarmsSection = AlarmsSection()

    @field_validator("name")
    @classmethod
    def _fits_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"\w[\w .,+=@()-]*", name) or ".." in name:
            raise ValueError(
                "a run's folder is called so: letters, digits, spaces and _.,+=@()-, no '..', no other sign first than _"
            )
        return name

    @field_validator("model")
    @classmethod
    def _is_a_name(cls, model: str) -> str:
        if not model.strip() or not model.isprintable() or max(len(part.encode()) for part in model.split("/")) > 255:
            raise ValueError("expected a name on the Hugging Face hub, or a folder")
        return model

    @field_validator("domains", "guardrails", mode="before")
    @classmethod
    def _tell_its_key(cls, sections: Any, info: Any) -> Any:
        """A domain knows its name and a guardrail its domain; in a recipe both are its key."""
        if not isinstance(sections, Mapping):
            return sections
        field = KEY[info.field_name]
        return {
            k: {field: k, **section} if isinstance(section, Mapping) else section for k, section in sections.items()
        }

    @field_serializer("domains", "guardrails", mode="wrap")
    def _leave_it_to_the_key(self, sections: Any, written: Any, info: Any) -> Any:
        field = KEY[info.field_name]
        return {key: {k: v for k, v in section.items() if k != field} for key, section in written(sections).items()}

    def as_yaml(self) -> str:
        """Return the resolved recipe, defaults included; `load_recipe` reads it back to an equal one."""
        out = io.StringIO()
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        yaml.dump(self.model_dump(exclude_none=True, by_alias=True), out)
        return out.getvalue()

    @property
    def trusts_code(self) -> bool:
        """Whether code in the model's own folder is run: `grpo.trust_remote_code`."""
        return bool(self.grpo.get("trust_remote_code"))

    @property
    def of_trainer(self) -> TrainerSettings:
        """What the trainer is told beside TRL's arguments."""
        return TrainerSettings.of(
            evaluation=self.eval,
            entropy=self.entropy,
            pool=self.pool,
            update=UpdateSettings(
                advantages=self.advantages,
                guard=self.guard,
                rft=self.rft if self.algorithm == "rft" else None,
                distil=self.distil if self.algorithm == "distil" else None,
                sft=self.sft if self.algorithm == "sft" else None,
                teachers=self.teachers,
                drop_dead=self.update.drop_dead,
            ),
            faults=self.faults,
            checkpoint=self.checkpoint,
            environments=self.environments,
            guardrails=list(self.guardrails.values()),
            max_grader_failures=self.rollouts.max_grader_failures,
        )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `key.path=value` overrides, check it. Paths are relative to the recipe's own folder.

    Modules in that folder can be imported from then on: the recipe's rewards and generators may be there.

    Raises RecipeError, in one line, naming the key, the value and what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"recipe {path} does not exist")
    try:
        document = read_yaml(path)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return _checked(document, overrides, path.resolve().parent)


def claimed_recipe(run: Path) -> Path:
    """Return the file of the recipe that a run goes on with. Raises RecipeError where there is none."""
    folder = RunFolder(run)
    if folder.settings.is_file():
        raise RecipeError(f"--resume {run}: a run from Python; its script goes on, train(resume_from_checkpoint=True)")
    if not folder.recipe.is_file():
        raise RecipeError(f"--resume {run}: no run there ({folder.recipe.name} is missing)")
    return _as_written(folder)


def recipe_of_run(folder: RunFolder, overrides: Sequence[str] = (), *, needs: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a run; of one from Python, what its settings say of one.

    Of those, keys that only its script knows hold words; a scheduler of the script's is the default one. Raises RecipeError
    where such a key is among what the caller `needs`, by the beginnings of keys.
    """
    if not folder.settings.is_file():
        return load_recipe(_as_written(folder), overrides)
    try:
        document = read_object(folder.settings)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    in_words = document.pop("script", {})
    if unsaid := [key for key in in_words if key.startswith(tuple(needs))]:
        raise RecipeError(f"run {folder.path} is of a script, and only that knows {', '.join(unsaid)}: give a recipe")
    if "curriculum.scheduler" in in_words:
        del document["curriculum"]
    for section, _, name in (key.rpartition(".") for key in in_words):  # the model, rows and rewards may stay words
        if name not in ("model", "train", "heldout", "reward"):
            of_domain = section.removeprefix("domains.")
            place = document["domains"].get(of_domain) if of_domain != section else document.get(section, document)
            (place or {}).pop(name, None)
    document["grpo"] = {
        name: value for name, value in document["grpo"].items() if name in GRPO_KINDS and name not in OURS
    }
    document["grpo"].pop("generation_batch_size", None)  # TRL takes it or steps_per_generation
    return _checked(document, overrides, folder.path.resolve())


def _as_written(folder: RunFolder) -> Path:
    try:
        folder.check_recipe()
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return folder.recipe


def _checked(document: dict[str, Any], overrides: Sequence[str], folder: Path) -> Recipe:
    """Return the recipe of a document; its paths are relative to `folder`, where its modules may be too.

    Raises RecipeError with all that is wrong.
    """
    problems = [said for override in overrides for said in refusals(_apply, document, override)]
    look_in(folder)
    recipe, invalid = valid_part(Recipe, renamed(document), _meant)
    problems += invalid
    if recipe is None:
        grpo = document.get("grpo")
        raise RecipeError(*problems, *(_grpo_problems(grpo).values() if isinstance(grpo, Mapping) else ()))
    bad = _grpo_problems(recipe.grpo)
    recipe = recipe.model_copy(update={"grpo": {name: v for name, v in recipe.grpo.items() if name not in bad}})
    problems += bad.values()
    if unfound := refusals(_absolute_model, recipe.model, folder, "model"):
        problems, recipe = [*problems, *unfound], recipe.model_copy(update={"model": UNSAID})
    for check in (_check_engine, _check_keys, _check_adapter, _check_trainer, _check_sft):
        problems += refusals(check, recipe)
    try:
        recipe = _with_absolute_paths(recipe, folder)
    except RecipeError as error:
        raise RecipeError(*problems, str(error)) from error
    if problems:
        raise RecipeError(*problems, rest=recipe)
    return recipe


def refusals(check: Callable[..., Any], *given: Any) -> list[str]:
    """Return what a check says against what it is given, as a list of one; an empty one where it says nothing."""
    try:
        check(*given)
    except ValueError as error:
        return [str(error)]
    return []


def _apply(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}: expected key.path=value")
    *parents, last = key.split(".")
    section = document
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise RecipeError(f"override {override!r}: {parent!r} is a value, not a section")
    section[last] = read_value(text, f"override {override!r:.200}")


def _meant(place: Sequence[Any]) -> str:
    """Return, in words, which key of a recipe was meant by one that does not exist: here, elsewhere, or by another name."""
    *parents, name = map(str, place)
    said_by_key = KEY.get(parents[0]) if parents else None
    here = (
        [key for key in keys_at(Recipe, parents).values() if key != said_by_key] if parents != ["grpo"] else GRPO_KINDS
    )
    if name in GONE:
        return GONE[name]
    if parents[:1] == ["domains"] and name in HELDOUT:
        return "did you mean 'heldout'?"
    key = MEANT.get(name, name)
    if key in here:
        return nearest(key, here)
    if key in Recipe.model_fields:
        return f"did you mean the section {key!r} at the top?"
    path = f"grpo.{key}" if key in GRPO_KINDS else key if "." in key else _elsewhere().get(key)
    return f"did you mean {path!r}?" if path else nearest(name, here)


HELDOUT = ("eval", "test", "validation", "valid", "val", "dev", "held_out")
"""What others call a domain's held-out rows."""


@functools.cache
def _elsewhere() -> dict[str, str]:
    """Return the paths of the keys in sections, by their last part; of several the first."""
    found: dict[str, str] = {}
    for section, field in Recipe.model_fields.items():
        path = f"{section}.<name>" if section in (*KEY, "teachers") else section
        held = [k for k in (field.annotation, *get_args(field.annotation)) if hasattr(k, "__pydantic_fields__")]
        for key in keys_at(held[0], ()).values() if held else ():
            found.setdefault(key, f"{path}.{key}")
    return found


def _grpo_problems(grpo: Mapping[str, Any]) -> dict[str, str]:
    """Return what is wrong with fields of TRL's, by field."""
    found = {}
    for name, value in grpo.items():
        if name in OURS:
            found[name] = f"grpo.{name} is set by Polyphony: use {OURS[name]}"
        elif name not in GRPO_KINDS:
            found[name] = f"unknown key 'grpo.{name}'; {_meant(('grpo', name))}"
        elif needed := complaint(name, value):
            found[name] = f"grpo.{name} must be {needed}, got {shortened(value)}"
    if grpo.get("use_cpu") and grpo.get("deepspeed"):
        found["deepspeed"] = "grpo.use_cpu makes accelerate drop DeepSpeed without a word: leave out one of the two"
    return found


def _check_keys(recipe: Recipe) -> None:
    for key, field in KEY.items():
        for name, section in getattr(recipe, key).items():
            if (own := getattr(section, field)) != name:
                raise RecipeError(f"{key}.{name}.{field}: its key says it, leave it out; got {own!r}")


def _check_adapter(recipe: Recipe) -> None:
    if recipe.adapter is None:
        return
    if recipe.lora is not None:
        raise RecipeError("adapter and lora exclude each other: one adapter is trained; leave out one of the two")
    if (strategy := recipe.cluster.strategy) != "ddp":
        raise RecipeError(
            f"adapter.kind osf with cluster.strategy={strategy}: a layer's gradients are projected whole, which needs ddp"
        )


def _check_trainer(recipe: Recipe) -> None:
    if recipe.curriculum.scheduler == "d3" and recipe.algorithm != "distil":
        raise RecipeError("curriculum.scheduler d3 goes by distances to teachers: it needs algorithm: distil")
    of_trl = {"num_generations": GROUP_SIZE, **recipe.grpo}.get
    recipe.of_trainer.check(list(recipe.domains.values()), engine=recipe.rollouts.engine, of_trl=of_trl)
    check_ahead(recipe.rollouts.ahead, recipe.of_trainer.guardrails, of_trl)


def _check_sft(recipe: Recipe) -> None:
    if recipe.algorithm != "sft":
        return
    plain = {key: Recipe.model_fields[key].get_default(call_default_factory=True) for key in SECTIONS}
    said = [key for key, default in plain.items() if getattr(recipe, key) != default]
    domains, guardrails = list(recipe.domains.values()), list(recipe.guardrails.values())
    if recipe.rollouts.ahead:
        raise RecipeError(
            f"rollouts.ahead={recipe.rollouts.ahead} with algorithm: sft: it samples no draws; leave it out"
        )
    if recipe.entropy.control != EntropySettings().control:
        said.append("entropy.control")
    if (strategy := recipe.cluster.strategy) != ClusterSection().strategy:
        raise RecipeError(
            f"cluster.strategy={strategy} with algorithm: sft: every rank holds all weights, as under ddp"
        )
    check_sft(recipe.sft, said, domains=domains, guardrails=guardrails, grpo=recipe.grpo)


def _check_engine(recipe: Recipe) -> None:
    """Refuse fields of TRL's that nothing would hear, and what is for an engine that does not sample."""
    engine, grpo = recipe.rollouts.engine, recipe.grpo
    if grpo.get("use_vllm") and engine not in ("vllm", "transformers"):
        raise RecipeError(f"rollouts.engine {engine} and grpo.use_vllm=true exclude each other; leave out one")
    sampler = "trl" if grpo.get("use_vllm") else "transformers" if engine == "transformers" else "ours"
    if sampler != "ours" and recipe.rollouts.engine_args:
        raise RecipeError("rollouts.engine_args are for engines of ours; TRL's own take grpo.vllm_*")
    defaults = {name: kinds[0].allowed[0] for name, kinds in UNHEARD.items()}
    unheard = complaints(lambda name: grpo.get(name, defaults.get(name)), sampler=sampler, has_run=True)
    lines = [f"grpo.{what}" for _, what in unheard]
    if engine == "ray" and grpo.get("vllm_enable_sleep_mode"):
        lines.append("grpo.vllm_enable_sleep_mode with rollouts.engine ray: its workers hold weights at all times")
    if lines:
        raise RecipeError(*lines)


def _with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    domains = {
        name: replace(
            domain,
            train=_absolute(domain.train, folder, f"domains.{name}.train"),
            heldout=_absolute(domain.heldout, folder, f"domains.{name}.heldout"),
        )
        for name, domain in recipe.domains.items()
    }
    guardrails = {
        name: replace(guardrail, prompts=_absolute(guardrail.prompts, folder, f"guardrails.{name}.prompts"))
        for name, guardrail in recipe.guardrails.items()
    }
    model = _absolute_model(recipe.model, folder, "model")
    teachers = {
        name: replace(teacher, model=_absolute_model(teacher.model, folder, f"teachers.{name}.model"))
        if teacher.model is not None and teacher.endpoint is None
        else teacher
        for name, teacher in recipe.teachers.items()
    }
    if recipe.sft.answers is not None:
        answers = _absolute(recipe.sft.answers, folder, "sft.answers")
        recipe = recipe.model_copy(update={"sft": replace(recipe.sft, answers=answers)})
    if recipe.pool is not None and recipe.pool.start is not None:
        pool = replace(recipe.pool, start=_absolute(recipe.pool.start, folder, "pool.from"))
        recipe = recipe.model_copy(update={"pool": pool})
    transfer = _absolute(recipe.curriculum.transfer, folder, "curriculum.transfer")
    curriculum = recipe.curriculum.model_copy(update={"transfer": transfer})
    return recipe.model_copy(
        update={
            "domains": domains,
            "model": model,
            "curriculum": curriculum,
            "teachers": teachers,
            "guardrails": guardrails,
        }
    )


def _absolute_model(model: str, folder: Path, where: str) -> str:
    """Return the whole path of a folder, a name on the hub as it is. Raises RecipeError for a folder that is not there."""
    if model in (CURRENT, START):
        return model
    if (folder / model).is_dir():
        return str((folder / model).resolve())
    if model.startswith((".", "/")):
        raise RecipeError(f"{where}: folder {folder / model} does not exist")
    return model


def _absolute(source: Any, folder: Path, where: str) -> Any:
    if isinstance(source, Mapping) and "path" in source:
        return {**source, "path": _absolute(source["path"], folder, where)}
    if isinstance(source, list):
        return [_absolute(one, folder, where) if isinstance(one, str) else one for one in source]
    if not isinstance(source, str) or source.startswith("hf://"):
        return source
    try:
        return str((folder / source).resolve())
    except (RuntimeError, ValueError) as error:  # a link that leads to itself; a NUL
        raise RecipeError(f"{where}: {source!r:.200} is no path: {error}") from error
