"""What of a run's settings may be another when it goes on, and how that is told."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

MAY_CHANGE = {
    "name": "",
    "checkpoint.": "",
    "faults.": "",
    "guardrails.": "what may be lost",
    "teachers.*.client.": "",
    "teachers.*.endpoint": "",
    "tracking.": "",
    "eval.shown": "",
    "rollouts.max_grader_failures": "",
    "rollouts.workers": "",
    "rollouts.timeout_s": "",
    "rollouts.start_timeout_s": "",
    "rollouts.address": "",
    "cluster.slurm.": "",
    "cluster.port": "",
    "cluster.ray_port": "",
    "grpo.max_steps": "the learning-rate curve, and the lengths of stages",
    "grpo.num_train_epochs": "the learning-rate curve, and the lengths of stages",
    "grpo.vllm_gpu_memory_utilization": "",
    "grpo.report_to": "",
    "grpo.run_name": "",
    "grpo.project": "",
    "grpo.logging_": "",
}
"""Beginnings of the settings with other values of which a run may go on, as they change nothing of what was practised and
measured; and what they change from there on, beside themselves. A star stands for a name."""


def may_change(key: str) -> str | None:
    """Return what another value of a setting changes from now on; None where that would be what was, too."""
    begins = {begin if begin[-1] in "._" else f"{begin}.": words for begin, words in MAY_CHANGE.items()}
    return next((words for begin, words in begins.items() if fnmatchcase(f"{key}.", f"{begin}*")), None)


def from_now_on(changes: Mapping[str, tuple[Any, Any]], *, step: int) -> list[str]:
    """Return a line for each setting that is another one after this step, with what else that changes."""
    found = []
    for key, (then, now) in changes.items():
        also = may_change(key)
        found.append(f"{key}: {then!r} until step {step}, {now!r} from there on" + (f"; so are {also}" if also else ""))
    return found


def check_length(steps: int, *, reached: int) -> None:
    """Raise ValueError for a run that would be over at fewer steps than it has done."""
    if steps < reached:
        raise ValueError(
            f"the run has done {reached} steps and would be over at {steps}: max_steps must be at least {reached}, and more "
            "where it is to go on"
        )


def flat(document: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their key paths.

    Example: `flat({"grpo": {"seed": 1}}) == {"grpo.seed": 1}`
    """
    found = {}
    for key, value in document.items():
        place = f"{before}{key}"
        found |= flat(value, f"{place}.") if isinstance(value, Mapping) and value else {place: value}
    return found
