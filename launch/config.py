"""The recipe: YAML 1.2 in, checked and frozen; every error names the full key and the nearest one that exists.

No torch, no TRL: a recipe is checked in milliseconds, `grpo.*` against the committed list of TRL's fields.
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from launch.grpo_fields import GRPO_FIELDS, OURS


class RecipeError(ValueError):
    """A recipe that cannot be run, in one line."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _default(section: BaseModel, name: str) -> Any:
    return type(section).model_fields[name].default


class DiversitySection(_Section):
    """How answers of a group that say something else than their siblings are rewarded (`rewards.diversity`)."""

    partitioner: Any = "embedding"
    """What tells which answers say the same: registry name, import path, or `{name: .., **arguments}`."""
    fuse: Literal["mul", "add"] = "mul"
    distance: Literal["classes", "pairs"] = "classes"
    floor: float = Field(default=0.1, ge=0, le=1)
    """Difference that an answer keeps where all say the same; 1 measures without rewarding."""
    shape: tuple[float, float] | None = None
    """What quality 1 and quality 0 become before `mul`; a structured domain must say it."""
    coefficient: float = Field(default=0.5, ge=0)
    """Of `add`."""
    add_bias: bool = False

    @field_validator("partitioner")
    @classmethod
    def _names_a_partitioner(cls, partitioner: Any) -> Any:
        return _named(partitioner)


class DomainSection(_Section):
    """One domain; without `train` it is watch-only."""

    kind: Literal["structured", "open_ended"]
    train: Any = None
    """Path, `hf://org/name`, `{path, split, limit}` or `{generator: pkg.module:function, ..}`."""
    heldout: Any
    reward: Any
    """Registry name, import path, or `{name: .., **arguments}`."""
    weight: float = Field(default=1.0, ge=0)
    advantages: Literal["group", "mean_only"] | None = None
    """As the recipe's `advantages`, for this domain alone."""
    max_completion_length: int | None = Field(default=None, ge=1)
    system_prompt: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    diversity: DiversitySection | None = None

    @field_validator("reward")
    @classmethod
    def _names_a_reward(cls, reward: Any) -> Any:
        return _named(reward)

    @field_validator("diversity")
    @classmethod
    def _keeps_right_above_wrong(cls, diversity: DiversitySection | None, info: Any) -> DiversitySection | None:
        if diversity is not None and info.data.get("kind") == "structured":
            from rewards.diversity import Diversity

            Diversity(**{**diversity.model_dump(), "partitioner": "exact"}).check_verifiable()
        return diversity


def _named(spec: Any) -> Any:
    if not isinstance(spec.get("name") if isinstance(spec, Mapping) else spec, str):
        raise ValueError("expected a name, pkg.module:name, or a mapping with `name`")
    return spec


class CurriculumSection(BaseModel):
    """`scheduler` by registry name or import path; every other key is a setting of that scheduler."""

    model_config = ConfigDict(extra="allow", frozen=True)
    scheduler: str = "auto"
    transfer: str | None = None
    """A probe's `transfer.json`: what schedulers that plan start from, and what the report draws."""

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class RolloutsSection(_Section):
    """Who generates."""

    engine: Literal["vllm", "ray", "transformers"] = "vllm"
    """`vllm`: in the trainer's process; `ray`: a pool of workers; `transformers`: no engine of its own."""
    workers: int = Field(default=1, ge=1)
    """Of `engine: ray`; each holds one vLLM."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs (CPU build: cores) of each worker."""
    max_staleness: int = Field(default=0, ge=0)
    """Completions of a worker that is up to so many weight syncs behind are kept and importance-corrected; older ones
    are refused and sampled again."""
    timeout_s: float = Field(default=600.0, gt=0)
    """A worker that has not finished its share of a draw after so many seconds counts as hung and is replaced."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """How long a cluster and its workers may take to come up; large models read their weights for minutes."""
    address: str | None = None
    """Of the Ray cluster, `host:port` or `auto`; by default `RAY_ADDRESS`, or a cluster of this machine."""
    max_grader_failures: float = Field(default=0.5, ge=0, le=1)
    """Largest share of a domain's completions in one draw that its reward may fail on before the run stops."""

    @model_validator(mode="after")
    def _pool_needs_ray(self) -> RolloutsSection:
        pool = {"workers", "tensor_parallel", "max_staleness", "timeout_s", "start_timeout_s", "address"}
        if self.engine != "ray" and (changed := sorted(n for n in pool if getattr(self, n) != _default(self, n))):
            raise ValueError(f"{', '.join(changed)} belong to engine: ray, this recipe has engine: {self.engine}")
        return self


class EvalSection(_Section):
    """Held-out evaluation of all domains."""

    every: int = Field(default=50, ge=1)
    """Optimizer steps between evaluations; there is always one before the first step and one after the last."""
    samples: int = Field(default=4, ge=1)
    """Completions an item."""
    shown: int = Field(default=3, ge=0)
    """Items of each domain whose completion is kept for people to read."""
    greedy: bool = False
    """Also decode every item greedily, apart from the samples; `polyphony eval` always does."""
    kl_items: int = Field(default=64, ge=0)
    """Items of each domain on which the distance to the base model is measured; 0 leaves it out."""


class CheckpointSection(_Section):
    """What is saved on the way, beside `final/`."""

    every: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints; by default as often as evaluations."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept; the best by worst domain is kept as well."""


class FaultsSection(_Section):
    """What a run puts up with."""

    max_skipped: int = Field(default=3, ge=0)
    """Steps in a row whose loss or gradient is not finite; each is left out and counted, one more stops the run."""
    grace_s: float = Field(default=30.0, gt=0)
    """Seconds from SIGTERM to the kill that follows; 30 is the default of Slurm and of Kubernetes."""


class SlurmSection(_Section):
    """What `polyphony launch slurm` asks Slurm for."""

    partition: str | None = None
    account: str | None = None
    time: str = "24:00:00"
    """Wall-clock limit; the job saves a checkpoint before it, and is queued again."""
    signal_s: int = Field(default=120, ge=10)
    """Seconds before the limit, or before a preemption, at which the job is told; a draw and a save have to fit in."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines before anything else: `module load ..`, `source venv/bin/activate`."""
    options: list[str] = Field(default_factory=list)
    """Further #SBATCH options, such as `--gres=gpu:8` or `--qos=long`."""


class ClusterSection(_Section):
    """Who trains where; read by `polyphony launch`, not by `train`."""

    strategy: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = "ddp"
    """How trainer ranks share the policy: `launch/accelerate/<strategy>.yaml`."""
    processes: int = Field(default=1, ge=1)
    """Trainer ranks on each trainer node, one a GPU; the other GPUs are the rollout workers'."""
    trainer_nodes: int = Field(default=1, ge=1)
    rollout_nodes: int = Field(default=0, ge=0)
    """Nodes that hold nothing but rollout workers; with 0 they live beside the trainer."""
    port: int = Field(default=29500, ge=1024, le=65535)
    """Where the trainer ranks meet."""
    ray_port: int = Field(default=6379, ge=1024, le=65535)
    slurm: SlurmSection = SlurmSection()


class ProbeSection(_Section):
    """`polyphony probe`: what training on one domain alone does to every domain."""

    steps: int = Field(default=40, ge=1)
    """Optimizer steps of each single-domain run."""
    seeds: int = Field(default=2, ge=1)
    """Repetitions; with one, intervals know of evaluation noise only."""
    start: str = Field(default="base", alias="from")
    """Where every run starts: `base` (the recipe's model), `joint:<steps>` (after that many steps on all domains), or
    the folder of a checkpoint. From the base, transfer is partly format learning that later stages saturate; from a
    warmed policy it is erosion, smaller and harder to see. `base` because in the lab its probes ranked the 24 trained
    orders better (rank correlation .33 against .06; one world, one training seed: launch/lab/RESULTS.md)."""
    joint_arm: bool = True
    """Also train on all domains for the same total of steps: what a sequence has to beat."""


class RefillSection(_Section):
    """Groups whose rewards are all equal are replaced within the draw by groups of further prompts of their domain."""

    max_rounds: int = Field(default=2, ge=0)
    """With half of the groups dead, two rounds leave about one in eight."""


class PoolSection(_Section):
    """Choose prompts by what is known of their pass rates; without this section every prompt is drawn once a pass."""

    impossible_below: float = Field(default=0.05, gt=0, lt=1)
    """Pass rate below which, with 95 % confidence, a prompt is given up for long; takes about eight visits of eight."""
    defer_below: float = Field(default=0.125, gt=0, lt=1)
    """Posterior mean below which a prompt waits."""
    mastered_above: float = Field(default=0.9, gt=0, lt=1)
    """Posterior mean above which it is only reviewed."""
    discount: float = Field(default=0.99, ge=0.5, le=1)
    """Of earlier evidence at each visit."""
    sampling: str = "uniform"
    """Among the unseen and active: `uniform`, `thompson` (largest p (1 - p)), or an import path."""
    retry_share: float = Field(default=0.1, ge=0, le=1)
    """Largest share of a domain's prompts that are waiting ones whose turn has come."""
    retry_deferred: int = Field(default=10, ge=1)
    """Draws until a deferred prompt is tried again; likewise the next two."""
    retry_mastered: int = Field(default=50, ge=1)
    retry_impossible: int = Field(default=100, ge=1)
    when_exhausted: Literal["continue", "stop"] = "continue"
    """Where every prompt of every domain is mastered or impossible: go on with the least bad, or stop with a message."""
    refill: RefillSection = RefillSection()
    start: str | None = Field(default=None, alias="from")
    """`pool.npz` of a `screen`, or of an earlier run: what is known already, matched by the prompts' ids."""

    @model_validator(mode="after")
    def _is_a_band(self) -> PoolSection:
        if not self.impossible_below <= self.defer_below < self.mastered_above:
            raise ValueError("expected impossible_below <= defer_below < mastered_above")
        return self


class GuardSection(_Section):
    """What a lone success of a group may do: with G completions its advantage is about sqrt(G - 1)."""

    cap: float = Field(default=2.0, gt=0)
    """Largest advantage of a lone success."""
    drop_shortcuts: bool = True
    """Give it none where it shows signs of a shortcut that the domain's other correct answers do not show."""


class UpdateSection(_Section):
    """The update itself."""

    drop_dead: Literal["auto", "always", "never"] = "auto"
    """Leave out rows that cannot move the policy: `auto` where the gradient stays what it is, `always` or an error."""


class RftSection(_Section):
    """`algorithm: rft`: train on accepted samples only."""

    accept_from: float = 1.0
    """Smallest reward of an accepted sample."""
    top_k: int | None = Field(default=None, ge=1)
    """Most samples a prompt, the best first."""
    dedup: Any = None
    """A partitioner's name: one sample of each semantic class."""


class LoraSection(_Section):
    """Train low-rank adapters instead of all weights (PEFT); `final/` is merged."""

    r: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    target_modules: str | list[str] = "all-linear"


class GuardrailSection(_Section):
    """How much a domain, trained or only watched, may lose before something is done; judged with confidence."""

    max_drop: float = Field(ge=0, le=1)
    action: Literal["warn", "stop", "rollback"] = "warn"
    """`rollback` reloads the checkpoint whose worst domain was best, and the scheduler is told."""


class EntropySection(_Section):
    """Token entropy of every domain, in multiples of the base model's at the run's first evaluation."""

    band: tuple[float, float] = (0.5, 1.5)
    """Where it should stay. Half: the structured domains of the lab lose that much while their score still rises."""
    control: Literal["none", "adaptive"] = "none"
    """`adaptive` adds an entropy term to the loss, with a coefficient of each domain's own that is 0 inside the band."""
    push: float = Field(default=1.0, ge=0)
    """Coefficient at once, for an entropy that is off by the base model's whole entropy."""
    rate: float = Field(default=0.05, gt=0)
    """Growth of the coefficient per draw for the same distance."""
    max_coefficient: float = Field(default=1.0, gt=0)
    """Either way; at 1 the term weighs as much as an advantage of 1."""

    @field_validator("band")
    @classmethod
    def _holds_the_base_model(cls, band: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= band[0] < 1 < band[1]:
            raise ValueError("expected multiples low < 1 < high of the base model's entropy")
        return band


class DataSection(_Section):
    """How rows are taken in."""

    overlap: Literal["drop", "keep", "error"] = "drop"
    """What happens to training rows that repeat held-out rows."""


class WandbSection(_Section):
    """Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "polyphony"
    entity: str | None = None


class TrackingSection(_Section):
    """Trackers of ours; others work through `grpo.report_to`."""

    wandb: WandbSection | None = None


class Recipe(_Section):
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

    Raises RecipeError, in one line, naming the key, the value and what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"recipe {path} does not exist")
    document = _read_yaml(path)
    for override in overrides:
        _apply(document, override)
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        raise RecipeError(_explain(error)) from error
    _check_grpo(recipe.grpo)
    _check_entropy(recipe)
    if recipe.eval.greedy and recipe.rollouts.engine == "transformers":
        raise RecipeError("eval.greedy needs an engine of ours; rollouts.engine transformers samples everything alike")
    for name in recipe.guardrails:
        if name not in recipe.domains:
            raise RecipeError(f"unknown domain 'guardrails.{name}'; {_nearest(name, list(recipe.domains))}")
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
    for name in grpo:
        if name in OURS:
            raise RecipeError(f"grpo.{name} is set by Polyphony: use {OURS[name]}")
        if name not in GRPO_FIELDS:
            raise RecipeError(f"unknown key 'grpo.{name}'; {_nearest(name, GRPO_FIELDS)}")
    if grpo.get("use_cpu") and grpo.get("deepspeed"):
        raise RecipeError("grpo.use_cpu makes accelerate drop DeepSpeed without a word: leave out one of the two")


def _check_entropy(recipe: Recipe) -> None:
    """Refuse two controllers of the same thing, and a loss that would not hear ours."""
    if recipe.entropy.control == "none":
        return
    for name in ("entropy_coef", "use_adaptive_entropy", "use_liger_kernel"):
        if value := recipe.grpo.get(name):
            raise RecipeError(f"entropy.control: adaptive and grpo.{name}={value} exclude each other; leave out one")


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
