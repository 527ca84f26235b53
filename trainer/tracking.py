"""Weights & Biases: the same keys as `metrics.jsonl`, one W&B step a line. Offline unless the recipe says otherwise."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import wandb

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbSettings:
    """Where a run is tracked."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "polyphony"
    entity: str | None = None


class WandbTracker:
    """Log metrics to one W&B run. If W&B cannot start, it says so once and the run goes on without it."""

    def __init__(self, settings: WandbSettings, *, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            self._run = wandb.init(
                mode=settings.mode,
                project=settings.project,
                entity=settings.entity,
                name=name,
                dir=str(folder),
                config=dict(config),
                reinit="create_new",
                settings=wandb.Settings(console="off", init_timeout=30),
            )
        except wandb.Error as error:
            logger.warning("W&B cannot start (%s); the run goes on, its metrics are in metrics.jsonl", error)
            self._run = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._run is not None:
            self._run.log(dict(metrics), step=step)

    def finish(self) -> None:
        if self._run is not None:
            self._run.finish()
