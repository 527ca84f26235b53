"""The recipe: YAML 1.2 in, checked and frozen; every error names the full key and the nearest one that exists.

No torch, no TRL: a recipe is checked in milliseconds, `grpo.*` against the committed list of TRL's fields.
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from polyphony.launch.grpo_fields import GROUP_SIZE, GRPO_KINDS, OURS, TRL_ENGINE, complaint
from polyphony.launch.import_paths import look_in, renamed
from polyphony.launch.sections import (
    CheckpointSection,
    ClusterSection,
    CurriculumSection,
    DataSection,
    DomainSection,
    EntropySection,
    EvalSection,
    FaultsSection,
    GuardrailSection,
    GuardSection,
    LoraSection,
    PoolSection,
    ProbeSection,
    RftSection,
    RolloutsSection,
    Section,
    TrackingSection,
    UpdateSection,
)


class RecipeError(ValueError):
    """A recipe that cannot be run, in one line."""


class Recipe(Section):
    """One run, whole.

    Example: `load_recipe("launch/recipes/debug.yaml", ["grpo.max_steps=4"]).domains["arithmetic"].kind`
    """

    name: str
    model: str
    algorithm: Literal["grpo", "rft"] = "grpo"
    """`rft` is rejection-sampling fine-tuning; reinforcement fine-tuning on filtered prompts is `grpo` with `pool`."""
    advantages: Literal["group", "mean_only"] = "group"
    """(r - mean) / std of the group, as TRL has it, or r - mean."""
    domains: dict[str, DomainSection] = Field(min_length=1)
    curriculum: CurriculumSection = CurriculumSection()
    pool: PoolSection | None = None
    guard: GuardSection | None = None
    rft: RftSection = RftSection()
    update: UpdateSection = UpdateSection()
    rollouts: RolloutsSection = RolloutsSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    data: DataSection = DataSection()
    grpo: dict[str, Any] = Field(default_factory=dict)
    """TRL's GRPOConfig, handed over untouched."""
    entropy: EntropySection = EntropySection()
    guardrails: dict[str, GuardrailSection] = Field(default_factory=dict)
    faults: FaultsSection = FaultsSection()
    cluster: ClusterSection = ClusterSection()
    lora: LoraSection | None = None
    probe: ProbeSection = ProbeSection()
    tracking: TrackingSection = TrackingSection()

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
        recipe = Recipe.model_validate(renamed(document))
    except ValidationError as error:
        raise RecipeError(_explain(error)) from error
    _check_grpo(recipe.grpo)
    _check_engine(recipe)
    _check_entropy(recipe)
    size = recipe.grpo.get("num_generations", GROUP_SIZE)
    if recipe.pool is not None and recipe.pool.look is not None and recipe.pool.look >= size:
        raise RecipeError(f"pool.look: must be below grpo.num_generations={size}, got {recipe.pool.look}")
    if recipe.eval.greedy and recipe.rollouts.engine == "transformers":
        raise RecipeError("eval.greedy needs an engine of ours; rollouts.engine transformers samples everything alike")
    by_domain = {"guardrails": recipe.guardrails, "entropy.control": recipe.entropy.control}
    for key, named in by_domain.items():
        for name in named if isinstance(named, Mapping) else ():
            if name not in recipe.domains:
                raise RecipeError(f"unknown domain '{key}.{name}'; {_nearest(name, list(recipe.domains))}")
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


def _explain(error: ValidationError) -> str:
    """Return the first problem in one line, with the nearest valid key for an unknown one."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(first["loc"][:-1])
        return f"unknown key {where!r}; {_nearest(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"{where}: required, but not given"
    return f"{where}: {first['msg']}, got {first['input']!r}"


def _fields_at(location: Sequence[Any]) -> list[str]:
    model: Any = Recipe
    for part in location:
        annotation = model.model_fields[part].annotation if isinstance(model, type) else get_args(model)[1]
        candidates = [annotation, *get_args(annotation)]
        models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        model = annotation if getattr(annotation, "__origin__", None) is dict else models[0]
    return [field.alias or name for name, field in model.model_fields.items()]


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def _check_grpo(grpo: Mapping[str, Any]) -> None:
    for name, value in grpo.items():
        if name in OURS:
            raise RecipeError(f"grpo.{name} is set by Polyphony: use {OURS[name]}")
        if name not in GRPO_KINDS:
            raise RecipeError(f"unknown key 'grpo.{name}'; {_nearest(name, GRPO_KINDS)}")
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


def _check_entropy(recipe: Recipe) -> None:
    """Refuse two controllers of the same thing, and a loss that would not hear ours."""
    if not recipe.entropy.held("coefficient", list(recipe.domains)):
        return
    for name in ("entropy_coef", "use_adaptive_entropy", "use_liger_kernel"):
        if value := recipe.grpo.get(name):
            raise RecipeError(f"entropy.control and grpo.{name}={value} exclude each other; leave out one")


def _with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    domains = {
        name: section.model_copy(
            update={split: _absolute(getattr(section, split), folder) for split in ("train", "heldout")}
        )
        for name, section in recipe.domains.items()
    }
    model = recipe.model
    if model.startswith(("./", "../", "/")) or (folder / model).is_dir():
        if not (folder / model).is_dir():
            raise RecipeError(f"model: folder {folder / model} does not exist")
        model = str((folder / model).resolve())
    if recipe.pool is not None and recipe.pool.start is not None:
        pool = recipe.pool.model_copy(update={"start": _absolute(recipe.pool.start, folder)})
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
