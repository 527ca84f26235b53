"""What a recipe says of a domain: its rows, its reward, and how answers that differ are paid."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from polyphony.launch.sections.base import Section, named


class DiversitySection(Section):
    """How answers of a group that say something else than their siblings are rewarded (`polyphony.rewards.diversity`)."""

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
        return named(partitioner)


class DomainSection(Section):
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
        return named(reward)

    @field_validator("diversity")
    @classmethod
    def _keeps_right_above_wrong(cls, diversity: DiversitySection | None, info: Any) -> DiversitySection | None:
        if diversity is not None and info.data.get("kind") == "structured":
            from polyphony.rewards.diversity import Diversity

            Diversity(**{**diversity.model_dump(), "partitioner": "exact"}).check_verifiable()
        return diversity
