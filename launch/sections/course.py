"""What is practised when, how it is measured, what is kept and who is told."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from polyphony.launch.sections.base import Section


class CurriculumSection(BaseModel):
    """`scheduler` by registry name or import path; every other key is a setting of that scheduler."""

    model_config = ConfigDict(extra="allow", frozen=True)
    scheduler: str = "auto"
    transfer: str | None = None
    """A probe's `transfer.json`: what schedulers that plan start from, and what the report draws."""

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class EvalSection(Section):
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


class CheckpointSection(Section):
    """What is saved on the way, beside `final/`."""

    every: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints; by default as often as evaluations."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept; the best by worst domain is kept as well."""


class ProbeSection(Section):
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


class GuardrailSection(Section):
    """How much a domain, trained or only watched, may lose before something is done; judged with confidence."""

    max_drop: float = Field(ge=0, le=1)
    action: Literal["warn", "stop", "rollback"] = "warn"
    """`rollback` reloads the checkpoint whose worst domain was best, and the scheduler is told."""


class DataSection(Section):
    """How rows are taken in."""

    overlap: Literal["drop", "keep", "error"] = "drop"
    """What happens to training rows that repeat held-out rows."""


class WandbSection(Section):
    """Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "polyphony"
    entity: str | None = None


class TrackingSection(Section):
    """Trackers of ours; others work through `grpo.report_to`."""

    wandb: WandbSection | None = None
