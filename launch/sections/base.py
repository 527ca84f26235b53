"""What all sections are: strict and frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of a recipe; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def named(spec: Any) -> Any:
    """Check what names an exchangeable part, and return it as it is."""
    if not isinstance(spec.get("name") if isinstance(spec, Mapping) else spec, str):
        raise ValueError("expected a name, pkg.module:name, or a mapping with `name`")
    return spec


def default_of(section: BaseModel, name: str) -> Any:
    """Return what a key of the section is where the recipe does not say."""
    return type(section).model_fields[name].default
