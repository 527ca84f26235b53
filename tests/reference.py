"""Write launch/REFERENCE.md from the declarations: `make reference`, or `python -m tests.reference`.

A key's meaning is the docstring under its field, its range the field's own, so that there is no second place to keep true.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from polyphony.curricula.declarations import MOST
from polyphony.curricula.schedulers import REGISTRY, find_scheduler
from polyphony.launch.grpo_fields import GRPO_KINDS, LIMITS, OURS
from polyphony.launch.recipe import KEY, Recipe
from polyphony.launch.schema import classes_in, meanings
from polyphony.trainer.arguments import DIFFERS, HEARD, OF_TRAINER, UNHEARD
from polyphony.trainer.metrics import METRICS, OF_THE_RUN
from polyphony.trainer.run.signals import SIGNALS

FILE = Path(__file__).resolve().parent.parent / "launch" / "REFERENCE.md"
HEAD = """# Reference

Every key of a recipe, every scheduler's settings, every metric, every alarm. Written by `make reference` from the
declarations in the code; `tests/test_reference.py` fails where it is behind them. A key's path is written with dots, as on
the command line: `rollouts.engine=ray`. `<name>` is a name that the recipe chooses; `null` is Python's None. Numbers are
finite, and at most a thousand million.
"""
PLAIN = {int: "whole number", float: "number", bool: "true, false", str: "text", Any: "any"}
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
NAMES = {"domains": "<name>", "guardrails": "<domain>", "teachers": "<name>"}
"""How a section by name is written in a path."""


def allowed(annotation: Any) -> str:
    """Return in words what a field takes by its type."""
    if annotation in PLAIN:
        return PLAIN[annotation]
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " or ".join("null" if kind is NoneType else allowed(kind) for kind in inner)
    if origin is tuple:
        return (
            f"list of {PLAIN.get(inner[0]) or allowed(inner[0])}"
            if Ellipsis in inner
            else f"[{', '.join(PLAIN[kind] for kind in inner)}]"
        )
    return f"list of {allowed(inner[0])}" if origin is list else "mapping"


def _takes(field: FieldInfo) -> str:
    limits = [(sign, getattr(limit, name, None)) for limit in field.metadata for name, sign in SIGNS.items()]
    bounds = ", ".join(f"{sign} {value:g}" for sign, value in limits if value not in (None, MOST, -MOST))
    kind, _, null = allowed(field.annotation).partition(" or null")
    is_optional = NoneType in get_args(field.annotation)
    return f"{kind}{null} {bounds}".strip() + (" or null" if is_optional else "")


def written(value: Any) -> str:
    """Return a default as a recipe would say it."""
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, bool) or value is None:
        return str(value).replace("None", "null").lower()
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def table(rows: list[tuple[str, ...]], *head: str) -> list[str]:
    """Return a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def section(path: str, kind: Any, summary: str) -> Iterator[str]:
    """Yield a section of the recipe and then those inside it."""
    rows, inside, said = [], [], meanings(kind)
    for name, field in kind.__pydantic_fields__.items():
        key = field.validation_alias or name
        if name == KEY.get(path.partition(".")[0]):
            continue
        if held := classes_in(field.annotation):
            inside.append((".".join(filter(None, (path, key, NAMES.get(key)))), held[0], said.get(name, "")))
            continue
        default = field.get_default(call_default_factory=True)
        rows.append((f"`{key}`", written(default), _takes(field), said[name]))
    yield from ("", f"### {path or 'At the top'}", "", summary, "")
    yield from table(rows, "key", "default", "takes", "meaning") if rows else ()
    for inner, held, own in inside:
        yield from section(inner, held, " ".join((summary_of(held), own)).strip())


def summary_of(kind: Any) -> str:
    """Return the first paragraph of a docstring in one line."""
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


def rule_of(name: str, kind: type) -> str:
    """Return what a scheduler does: its file's first line, or its own where the file has several."""
    of_file = summary_of(inspect.getmodule(kind)).removeprefix(f"`{name}`").removeprefix(", the default")
    return of_file.removeprefix(": ") if of_file.startswith(": ") else summary_of(kind)


def settings_rows(kind: type, prefix: str = "") -> Iterator[tuple[str, ...]]:
    """Yield a row for each setting of a scheduler; settings that are a class of their own with a dot.

    Those of another scheduler stand under that one's name.
    """
    said = meanings(kind)
    for name, field in kind.__pydantic_fields__.items():  # type: ignore[attr-defined]
        if field.init is False:
            continue
        default = field.get_default(call_default_factory=True)
        is_class = is_dataclass(default)
        shown = ("`{}`" if hasattr(default, "decide") else "below") if is_class else written(default)
        yield (f"`{prefix}{name}`", shown, _takes(field), said[name])
        if shown == "below":
            yield from settings_rows(type(default), f"{prefix}{name}.")


def grpo() -> Iterator[str]:
    """Yield the fields of TRL's GRPOConfig: what each takes, and which a recipe says elsewhere."""
    by_kind: dict[str, list[str]] = {}
    for name, (kind, may_be_null) in sorted(GRPO_KINDS.items()):
        if name not in OURS:
            limits = f" {LIMITS[name][0]}" if name in LIMITS else ""
            takes = f"{kind or 'as in TRL'}{limits}{' or null' if kind and may_be_null else ''}"
            by_kind.setdefault(takes, []).append(f"`{name}`")
    fields_ = [(takes, ", ".join(names)) for takes, names in sorted(by_kind.items())]
    elsewhere = [(f"`grpo.{name}`", re.sub(r"^(--\w+|\w+\.[\w.<>]+)", r"`\1`", place)) for name, place in OURS.items()]
    yield from (
        "",
        "### grpo",
        "",
        "Defaults and meanings are TRL's, but for `logging_steps: 1`, `report_to: none` and `disable_tqdm: true`.",
        "",
    )
    yield from (*table(fields_, "takes", "fields"), "", *table(elsewhere, "instead of", "say"))


def of_trainer() -> Iterator[str]:
    """Yield what becomes of each argument of TRL's GRPOTrainer in a script whose import is changed."""
    yield from (
        "",
        "## A script of TRL's",
        "",
        "`from polyphony.trainer.grpo import DomainGRPOTrainer as GRPOTrainer`; its arguments, in TRL's order:",
        "",
    )
    yield from table([(f"`{name}`", what) for name, what in OF_TRAINER.items()], "argument", "what becomes of it")


def arguments() -> Iterator[str]:
    """Yield what becomes of each field of TRL's GRPOConfig, from a script as from a recipe."""
    yield from (
        "",
        "### What becomes of each field",
        "",
        "From a script as from a recipe, a field of TRL's is heard, heard with a difference, or refused by a ValueError",
        "before weights are loaded. With `run`: where a run folder is kept, as by every recipe.",
        "",
    )
    rows = [(f"`{name}`", DIFFERS.get(name, ""), refusals(name)) for name in sorted({*DIFFERS, *UNHEARD})]
    shown = [(name, heard or "as by TRL where it is not refused", no or "never") for name, heard, no in rows]
    shown = [(name, "no" if no.startswith("any value") else heard, no) for name, heard, no in shown]
    yield from table(shown, "field", "heard", "refused")
    yield from ("", f"Heard as without us: {', '.join(f'`{name}`' for name in sorted(HEARD))}.")


def refusals(name: str) -> str:
    """Return in words where a field is refused, and why."""
    kinds = UNHEARD.get(name, ())
    allowed = " or ".join(f"`{value}`" for value in kinds[0].allowed).replace("None", "null") if kinds else ""
    places = {"always": "any value", "run": "with `run`", "ours": "with an engine of ours", "trl": "with `use_vllm`"}
    places["transformers"] = "with `engine: transformers`"
    return "; ".join(f"{' or '.join(places[p] for p in kind.where)} but {allowed}: {kind.why}" for kind in kinds)


def schedulers() -> Iterator[str]:
    """Yield every scheduler by name."""
    yield from (
        "",
        "## Schedulers",
        "",
        "Settings stand beside `curriculum.scheduler`: `{scheduler: sec, step_size: 0.3}`.",
    )
    for name, path in REGISTRY.items():
        kind = find_scheduler(name)
        file = path.partition(":")[0].removeprefix("polyphony.").replace(".", "/") + ".py"
        yield from ("", f"### {name}", "", f"{rule_of(name, kind)} ([{file}](../{file}))", "")
        rows = list(settings_rows(kind))
        yield from table(rows, "setting", "default", "takes", "meaning") if rows else ["It has no settings."]


def metrics() -> Iterator[str]:
    """Yield every metric of ours by family."""
    yield from ("", "## Metrics", "", "Beside TRL's own. `<d>` is a domain. What is undefined is absent, never 0.")
    for family, described in METRICS.items():
        keys = [
            (f"{family}/{m}" if f"{family}/{m}" in OF_THE_RUN else f"{family}/<d>/{m}", t) for m, t in described.items()
        ]
        yield from ("", f"### {family}", "", *table([(f"`{key}`", text) for key, text in keys], "key", "meaning"))


def alarms() -> Iterator[str]:
    """Yield every alarm of a run, when it begins, and what may help."""
    rows = [(f"`{kind}`", signal.number, signal.remedy) for kind, signal in SIGNALS.items()]
    yield from ("", "## Alarms", "", "Each is told once when it begins, kept in `alarms.jsonl`, and in the report.", "")
    yield from table(rows, "alarm", "begins where", "what may help")


def reference() -> str:
    """Return the file's text."""
    recipe = section("", Recipe, "Sections follow, each with a heading.")
    parts = [*recipe, *grpo(), *arguments(), *of_trainer(), *schedulers(), *metrics(), *alarms(), ""]
    return "\n".join([HEAD, "## Recipe", *parts])


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")
