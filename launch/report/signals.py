"""The alarms of a run with what may help, and the signals that its metrics and evaluations show though nobody was told:
runs of older versions knew fewer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from polyphony.curricula.monitors import Alarm
from polyphony.curricula.records import Evaluation
from polyphony.curricula.transfer.halves import on_half
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.trainer.run.signals import SIGNALS, TRL_MAX_GRAD_NORM, Signals


def with_signals(
    recorded: Sequence[Mapping[str, Any]],
    *,
    metrics: Sequence[Mapping[str, Any]],
    recipe: Mapping[str, Any],
    transfer: TransferMatrix | None,
) -> list[Mapping[str, Any]]:
    """Return a run's alarms in order of step; a signal on record for a domain is taken from there alone."""
    known = {(str(line.get("kind")), str(line.get("domain"))) for line in recorded}
    found = () if _was_told(metrics) else found_again(metrics, recipe, transfer)
    again = [alarm.as_line() for alarm in found if (alarm.kind, alarm.domain) not in known]
    lines = [_helped(line) for line in [*recorded, *again]]
    return sorted(lines, key=lambda line: step if isinstance(step := line.get("step"), (int, float)) else 0)


def _was_told(metrics: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a run's version knew the list: this metric came with it."""
    return any(key.startswith("domain/") and key.endswith("/alike") for line in metrics[1:3] for key in line)


def found_again(
    metrics: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any], transfer: TransferMatrix | None
) -> Iterator[Alarm]:
    """Yield the signals of a run's metrics, then of its evaluations: of scores on the half of the items that decided."""
    grpo = recipe.get("grpo")
    clip = grpo.get("max_grad_norm", TRL_MAX_GRAD_NORM) if isinstance(grpo, Mapping) else TRL_MAX_GRAD_NORM
    keys = {key for line in metrics for key in line}
    trained = sorted({key.split("/")[1] for key in keys if key.startswith("domain/")})
    signals = Signals(
        trained=trained, prompts_per_draw=0, max_grad_norm=clip if isinstance(clip, (int, float)) else None
    )
    kl: dict[int, dict[str, dict[str, tuple[float, int]]]] = {}
    for line in metrics:
        step = line.get("step")
        if not isinstance(step, int) or not ("rollout/useful_token_frac" in line or "heldout/kl_current" in line):
            continue
        numbers = {key: value for key, value in line.items() if isinstance(value, (int, float))}
        yield from signals.see(step, numbers)
        logged = {name: numbers.get(f"heldout/{name}/kl_base") for name in trained}
        kl.setdefault(step, {}).update({n: {"all": (nats, 1)} for n, nats in logged.items() if nats is not None})
    if transfer is None or not transfer.items or not set(trained) <= set(transfer.domains):
        return
    rows: list[Evaluation] = []
    for row in next(iter(transfer.runs()), ()):
        rows.append(on_half(row, transfer.items, "steer"))
        yield from signals.after_evaluation(rows, kl.get(row.step, {}))


def _helped(line: Mapping[str, Any]) -> Mapping[str, Any]:
    signal = SIGNALS.get(str(line.get("kind")))
    return line if signal is None or "remedy" in line else {**line, "remedy": signal.remedy}
