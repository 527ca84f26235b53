"""The recipe: YAML 1.2 in, checked and frozen; every error names the full key and the nearest one that exists.

No torch, no TRL: a recipe is checked in milliseconds, `grpo.*` against the committed list of TRL's fields.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from polyphony.curricula.monitors.entropy_control import EntropySettings
from polyphony.curricula.monitors.guardrails import Guardrail
from polyphony.curricula.prompts.pool import PoolSettings
from polyphony.curricula.records import AdvantageKind, first_problem, keys_at, nearest
from polyphony.launch.grpo_fields import GROUP_SIZE, GRPO_KINDS, OURS, TRL_ENGINE, complaint
from polyphony.launch.import_paths import look_in, renamed
from polyphony.launch.sections import (
    CheckpointSection,
    ClusterSection,
    CurriculumSection,
    LoraSection,
    ProbeSection,
    RecipeDomain,
    RolloutsSection,
    TrackingSection,
)
from polyphony.trainer.settings import (
    DataSettings,
    EvaluationSettings,
    FaultSettings,
    Guard,
    RftSettings,
    RowSettings,
    UpdateSettings,
)

KEY = {"domains": "name", "guardrails": "domain"}
"""Sections by name, and the field that each one's key stands for."""


class RecipeError(ValueError):
    """A recipe that cannot be run, in one line."""


class Recipe(BaseModel):
    """One run, whole: settings that are declared where they act.

    Example: `load_recipe("launch/recipes/debug.yaml", ["grpo.max_steps=4"]).domains["arithmetic"].kind`
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    model: str
    algorithm: Literal["grpo", "rft"] = "grpo"
    """`rft` is rejection-sampling fine-tuning; reinforcement fine-tuning on filtered prompts is `grpo` with `pool`."""
    advantages: AdvantageKind = UpdateSettings().advantages
    domains: dict[str, RecipeDomain] = Field(min_length=1)
    """Without `train` a domain is watch-only."""
    curriculum: CurriculumSection = CurriculumSection()
    pool: PoolSettings | None = None
    """Without it every prompt is drawn once a pass."""
    guard: Guard | None = None
    rft: RftSettings = RftSettings()
    update: RowSettings = RowSettings()
    rollouts: RolloutsSection = RolloutsSection()
    eval: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSection = CheckpointSection()
    data: DataSettings = DataSettings()
    grpo: dict[str, Any] = Field(default_factory=dict)
    """TRL's GRPOConfig, handed over untouched."""
    entropy: EntropySettings = EntropySettings()
    guardrails: dict[str, Guardrail] = Field(default_factory=dict)
    faults: FaultSettings = FaultSettings()
    cluster: ClusterSection = ClusterSection()
    lora: LoraSection | None = None
    probe: ProbeSection = ProbeSection()
    tracking: TrackingSection = TrackingSection()

    @field_validator("name")
    @classmethod
    def _fits_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"\w[\w .,+=@()-]*", name):
            raise ValueError(
                "a run's folder is called so: letters, digits, spaces and _.,+=@()-, no other sign first than _"
            )
        return name

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


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `key.path=value` overrides, check it. Paths are relative to the recipe's own folder.

    Modules in that folder can be imported from then on: the recipe's rewards and generators may be there.

    Raises RecipeError, in one line, naming the key, the value and what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"recipe {path} does not exist")
    document = _read_yaml(path)
    for override in overrides:
        _apply(document, override)
    look_in(path.resolve().parent)
    try:
        recipe = Recipe.model_validate(renamed(document), by_alias=True, by_name=False)
    except ValidationError as error:
        raise RecipeError(first_problem(error, _keys_at)) from error
    _check_grpo(recipe.grpo)
    _check_engine(recipe)
    try:
        recipe.entropy.refuse_rivals(recipe.grpo, list(recipe.domains))
        if recipe.pool is not None:
            recipe.pool.check_look(recipe.grpo.get("num_generations", GROUP_SIZE))
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if recipe.eval.greedy and recipe.rollouts.engine == "transformers":
        raise RecipeError("eval.greedy needs an engine of ours; rollouts.engine transformers samples everything alike")
    for key, field in KEY.items():
        for name, section in getattr(recipe, key).items():
            if (own := getattr(section, field)) != name:
                raise RecipeError(f"{key}.{name}.{field}: its key says it, leave it out; got {own!r}")
    by_domain = {"guardrails": recipe.guardrails, "entropy.control": recipe.entropy.control}
    for key, named in by_domain.items():
        for name in named if isinstance(named, Mapping) else ():
            if name not in recipe.domains:
                raise RecipeError(f"unknown domain '{key}.{name}'; {nearest(name, list(recipe.domains))}")
    return _with_absolute_paths(recipe, path.resolve().parent)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        mark = error.problem_mark
        raise RecipeError(f"{path}:{mark.line + 1 if mark else '?'}: {error.problem or error.context}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(document, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    return document


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
    try:
        section[last] = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is not valid YAML") from error


def _keys_at(place: Sequence[Any]) -> list[str]:
    said_by_key = KEY.get(str(place[0])) if place else None
    return [key for key in keys_at(Recipe, place).values() if key != said_by_key]


def _check_grpo(grpo: Mapping[str, Any]) -> None:
    for name, value in grpo.items():
        if name in OURS:
            raise RecipeError(f"grpo.{name} is set by Polyphony: use {OURS[name]}")
        if name not in GRPO_KINDS:
            raise RecipeError(f"unknown key 'grpo.{name}'; {nearest(name, GRPO_KINDS)}")
        if needed := complaint(name, value):
            raise RecipeError(f"grpo.{name} must be {needed}, got {value!r}")
    if grpo.get("use_cpu") and grpo.get("deepspeed"):
        raise RecipeError("grpo.use_cpu makes accelerate drop DeepSpeed without a word: leave out one of the two")


def _check_engine(recipe: Recipe) -> None:
    """Refuse keys of TRL's own engines that none of ours would hear, and the other way round."""
    engine, grpo = recipe.rollouts.engine, recipe.grpo
    if grpo.get("use_vllm") and engine == "ray":
        raise RecipeError("rollouts.engine ray and grpo.use_vllm=true exclude each other; leave out one")
    if grpo.get("use_vllm") or engine == "transformers":
        if recipe.rollouts.engine_args:
            raise RecipeError("rollouts.engine_args are for engines of ours; TRL's own take grpo.vllm_*")
        return
    heard = {"vllm_enable_sleep_mode"} if engine == "vllm" else set()
    for name in sorted(grpo):
        if name in TRL_ENGINE and name not in heard:
            raise RecipeError(
                f"grpo.{name} is not heard by rollouts.engine {engine}; it belongs to TRL's own engine, grpo.use_vllm=true"
            )


def _with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    domains = {
        name: replace(domain, train=_absolute(domain.train, folder), heldout=_absolute(domain.heldout, folder))
        for name, domain in recipe.domains.items()
    }
    model = recipe.model
    if model.startswith(("./", "../", "/")) or (folder / model).is_dir():
        if not (folder / model).is_dir():
            raise RecipeError(f"model: folder {folder / model} does not exist")
        model = str((folder / model).resolve())
    if recipe.pool is not None and recipe.pool.start is not None:
        pool = replace(recipe.pool, start=_absolute(recipe.pool.start, folder))
        recipe = recipe.model_copy(update={"pool": pool})
    transfer = _absolute(recipe.curriculum.transfer, folder)
    curriculum = recipe.curriculum.model_copy(update={"transfer": transfer})
    return recipe.model_copy(update={"domains": domains, "model": model, "curriculum": curriculum})


def _absolute(source: Any, folder: Path) -> Any:
    if isinstance(source, Mapping) and "path" in source:
        return {**source, "path": _absolute(source["path"], folder)}
    if isinstance(source, str) and not source.startswith("hf://"):
        return str((folder / source).resolve())
    return source
