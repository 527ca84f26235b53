"""The run's memory on disk: decisions as they are taken, held-out rows as they are measured, and what follows from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.decision_log import decision_line
from polyphony.curricula.monitors import Alarm
from polyphony.curricula.records import Domain, Evaluation, Group, Prompt, mean
from polyphony.curricula.transfer.forgetting import moment
from polyphony.curricula.transfer.halves import halves, on_half
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.trainer.evaluation.answers import variety_metrics
from polyphony.trainer.evaluation.base_kl import mean_kl
from polyphony.trainer.evaluation.result import HeldoutResult
from polyphony.trainer.evaluation.statistics import Answers, as_lists
from polyphony.trainer.metrics import defined, key
from polyphony.trainer.run.folder import RunFolder

READ = {name: name for name in ("majority", "greedy", "format_valid", "format_share", "ece", "brier", "auroc",
                                "overconfidence")} | {"kl": "kl_base"}  # fmt: skip
"""Statistics of the answers that are logged, and under which metric; score, pass@k and entropy are there already."""
RESAMPLES = 200
"""For the intervals of one point of a curve, which nobody decides by."""


@dataclass(slots=True)
class Recorder:
    """Keep decisions, samples, evaluations and the transfer matrix of one run; only rank 0 writes.

    `steer` items go to the curriculum, which decides; the metrics returned are of the `report` items.
    """

    folder: RunFolder
    domains: tuple[Domain, ...]
    curriculum: Curriculum
    seed: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    is_main: bool = True
    """False on ranks other than 0: they keep the same memory and write nothing."""
    matrix: TransferMatrix | None = None

    def restore(self, step: int) -> None:
        """Go on with a folder: keep the probe's rows and the run's own up to `step`."""
        if self.folder.transfer.exists():
            saved = TransferMatrix.load(self.folder.transfer)
            kept = tuple(row for row in saved.rows if row.probe or row.step <= step)
            self.matrix = replace(saved, rows=kept) if kept else None

    def adopt(self, probe: TransferMatrix) -> None:
        """Begin with the rows of a probe of the same held-out items, so that prediction and outcome lie side by side."""
        self.matrix = replace(probe, rows=tuple(row for row in probe.rows if row.probe))

    def record_draw(self, step: int, refs: Sequence[Prompt]) -> None:
        """Write the decision of the draw that `refs` came from; `step` is the optimizer step it is for."""
        assert self.curriculum.basis is not None and self.curriculum.decision is not None
        self._write_reviews(self.curriculum.decision.state.get("reviews", []))
        line = decision_line(self.curriculum.basis, self.curriculum.decision, refs)
        self.folder.append("decisions", {"step": step, **line, "prompts": [ref.id for ref in refs]})

    def record_end(self) -> None:
        """Put what the last stage was expected to reach beside what the last evaluation measured."""
        self._write_reviews(self.curriculum.reviews())

    def _write_reviews(self, reviews: Sequence[Mapping[str, Any]]) -> None:
        if reviews and self.is_main:
            self.folder.write(self.folder.predicted, json.dumps(list(reviews)))

    def record_refill(self, step: int, refill_round: int, dead: Sequence[Group], refs: Sequence[Prompt]) -> None:
        """Write one refill: per domain the groups that taught nothing, by cause, and the prompts found for them."""
        names = ("all_correct", "all_wrong", "all_equal", "ungraded")
        causes: dict[str, dict[str, int]] = {}
        for group in dead:
            causes.setdefault(group.domain, dict.fromkeys(names, 0))[group.cause] += 1
        line = {"step": step, "round": refill_round, "dead": causes, "short": len(dead) - len(refs)}
        self.folder.append("refills", line | {"prompts": [ref.id for ref in refs]})

    def record_heldout(self, step: int, result: HeldoutResult) -> dict[str, float]:
        """Add a row to the transfer matrix, tell the curriculum, return the metrics of this evaluation."""
        row = Evaluation(
            trained=self._trained_since_last(),
            step=step,
            seed=self.seed,
            scores=result.scores(),
            entropy=result.entropy,
            exposure=dict(self.curriculum.drawn),
            rolled_back=self.curriculum.rolled_back,
        )
        self._note_unmeasured(row)
        self._add(row, result.items)
        self.curriculum.record(on_half(row, result.items, "steer"))
        for c in result.shown if self.is_main else ():
            shown = {"domain": c.prompt.domain, "prompt": c.prompt.prompt, "completion": c.text, "score": c.reward}
            self.folder.append("samples", {"step": step, **shown})
        if self.is_main:
            self.folder.append("evaluations", {"step": step, "domains": _details(result)})
        return self._metrics(row, result)

    def _note_unmeasured(self, row: Evaluation) -> None:
        """Put among the alarms the domains whose entropy was measured at the baseline and is not now."""
        for name in sorted(set(self._run[0].entropy) - set(row.entropy)) if self._run and self.is_main else ():
            message = "its held-out entropy was not measured; a scheduler that holds it takes it as inside its band"
            alarm = Alarm(step=row.step, domain=name, kind="entropy_unmeasured", message=message)
            self.folder.append("alarms", alarm.as_line())

    @property
    def worst_steer_score(self) -> float:
        """The lowest mean score of a trainable domain at the last evaluation, on the half that decides."""
        last = self.curriculum.evaluations[-1]
        return min(mean(last.scores[d.name]) for d in self.domains if not d.is_watch_only)

    @property
    def _run(self) -> tuple[Evaluation, ...]:
        """The rows of this run, oldest first."""
        return tuple(row for row in self.matrix.rows if not row.probe) if self.matrix else ()

    def _trained_since_last(self) -> tuple[str, ...]:
        """Return the scheduler's stage, where there was one (what it replays is in `exposure`), else all drawn from."""
        if self.curriculum.stage is not None:
            return (self.curriculum.stage,)
        before = self._run[-1].exposure if self._run else {}
        return tuple(name for name, n in self.curriculum.drawn.items() if n > before.get(name, 0))

    def _add(self, row: Evaluation, items: Mapping[str, Sequence[str]]) -> None:
        if self.matrix is None:
            self.matrix = TransferMatrix(
                domains=tuple(d.name for d in self.domains),
                kinds={d.name: d.kind for d in self.domains},
                rows=(row,),
                items={name: tuple(ids) for name, ids in items.items()},
                watch_only=tuple(d.name for d in self.domains if d.is_watch_only),
                provenance=dict(self.provenance),
            )
        else:
            self.matrix = self.matrix.with_row(row)
        if self.is_main:
            self.matrix.save(self.folder.transfer)

    def _metrics(self, row: Evaluation, result: HeldoutResult) -> dict[str, float]:
        assert self.matrix is not None
        metrics = heldout_metrics(result)
        if result.base_kl:
            others = [name for name in result.base_kl if name not in row.trained]
            metrics[key("heldout", "kl_current")] = mean_kl(result.base_kl, row.trained)
            metrics[key("heldout", "kl_others")] = mean_kl(result.base_kl, others)
        if len(self._run) > 1:
            run = [on_half(past, result.items, "report") for past in self._run]
            now = moment(run, watch_only=self.matrix.watch_only)
            for name in row.scores:
                for metric, interval in (("bwt", now.bwt[name]), ("drawdown", now.drawdown[name])):
                    metrics[key("transfer", metric, name)] = interval.mid
                    metrics[key("transfer", f"{metric}_low", name)] = interval.low
                    metrics[key("transfer", f"{metric}_high", name)] = interval.high
                metrics[key("transfer", "fwt", name)] = now.fwt[name].mid
            metrics[key("transfer", "bwt")] = now.mean_bwt
            metrics[key("transfer", "drawdown_max")] = now.worst_drawdown
        return defined(metrics)


def heldout_metrics(result: HeldoutResult) -> dict[str, float]:
    """Return the `heldout/<d>` metrics of one evaluation, of the items that are published.

    Raises ValueError for scores that are none, see `HeldoutResult.scores`.
    """
    published, passed = (
        on_half(Evaluation(trained=(), step=0, seed=0, scores=scores), result.items, "report").scores
        for scores in (result.scores(), result.passed())
    )
    metrics = variety_metrics(result.variety, result.items)
    for name in published:
        metrics[key("heldout", "score", name)] = mean(published[name])
        metrics[key("heldout", "pass_at_k", name)] = mean(passed[name])
        metrics[key("heldout", "grader_failures", name)] = sum(s is None for i in result.samples[name] for s in i)
        if name in result.entropy:
            metrics[key("heldout", "entropy", name)] = result.entropy[name]
        for metric, value in _report_half(result, name).values().items():
            if metric in READ:
                metrics[key("heldout", READ[metric], name)] = value
    return defined(metrics)


def _report_half(result: HeldoutResult, domain: str) -> Answers:
    """Return a domain's answers to the items that are published."""
    sides = halves(result.items[domain])
    return result.read(domain).take([i for i, side in enumerate(sides) if side == "report"])


def _details(result: HeldoutResult) -> dict[str, Any]:
    """Return, per domain, every statistic with its interval and the share of each output style, `report` half."""
    details = {}
    for name in result.answers:
        answers = _report_half(result, name)
        details[name] = as_lists(answers.intervals(resamples=RESAMPLES)) | {"styles": answers.styles()}
    return details
