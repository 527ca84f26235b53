"""What all sections are: strict and frozen."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def default_of(section: BaseModel, name: str) -> Any:
    return type(section).model_fields[name].default
