"""What all sections are: strict and frozen."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of a recipe; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def default_of(section: BaseModel, name: str) -> Any:
    """Return what a key of the section is where the recipe does not say."""
    return type(section).model_fields[name].default
