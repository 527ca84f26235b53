"""The run's memory on disk: decisions as they are taken, held-out rows as they are measured, and what follows from them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from polyphony.curricula.curriculum import Curriculum
from polyphony.curricula.decision_log import Choice, shortened
from polyphony.curricula.files import replace_file, sealed, unsealed
from polyphony.curricula.intervals import bounded_mean
from polyphony.curricula.monitors.entropy import place_in_band
from polyphony.curricula.records import Domain, Evaluation, graded, mean, per_token
from polyphony.curricula.transfer.forgetting import moment
from polyphony.curricula.transfer.halves import on_half
from polyphony.curricula.transfer.matrix import TransferMatrix, without_items
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
    skills: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Of rows, by domain and id."""
    entropy_band: tuple[float, float] = (math.nan, math.nan)
    """Multiples of a domain's entropy at the first evaluation."""
    is_main: bool = True
    """False on ranks other than 0: they keep the same memory and write nothing."""
    matrix: TransferMatrix | None = None
    """A probe's rows and this run's, with scores item by item; what else is told item by item is in the ledger alone."""
    is_by_item: bool = True
    """False in a run of a version that kept no entropy item by item: it goes on with that of all items in both halves."""
    _published: list[Evaluation] = field(default_factory=list)
    """The `report` half of the run's rows."""
    _last_line: dict[str, Any] | None = None
    """Of the decisions, whole: the next one is written as what differs from it."""

    def restore(self, step: int, *, say: Callable[[str], None] = lambda _: None) -> None:
        """Go on with a folder: keep the probe's rows and the run's own up to `step`, as the curriculum does."""
        places = count()
        # of the first row, after the head, the published half's own entropies are wanted: bands are multiples of them
        if lines := self.folder.read(
            "transfer", cut=lambda line: (without_items if next(places) > 1 else unsealed)(line)
        ):
            try:
                self.matrix = TransferMatrix.from_lines(lines, until=step)
            except ValueError as error:
                raise ValueError(f"{self.folder.ledger('transfer')}: {error}") from error
            self.is_by_item = all("entropy_items" in line for line in lines[1:])
        elif self.folder.transfer.exists():
            saved = TransferMatrix.load(self.folder.transfer)
            self.matrix = replace(saved, rows=tuple(row for row in saved.rows if row.probe or row.step <= step))
            self.is_by_item = all(row.entropy_items for row in self._run)
            if self.is_main:
                if self.is_by_item:  # an older version kept no ledger of it
                    say(f"{self.folder.ledger('transfer')} is missing: written anew from {self.folder.transfer.name}")
                self.folder.begin("transfer", self.matrix.head_line(), *(row.as_row() for row in self._run))
        if self.matrix is not None and self.matrix.items is not None:
            items = self.matrix.items
            self._published = [on_half(row, items, "report") for row in self._run]
            self.curriculum.evaluations = [on_half(row, items, "steer") for row in self._run]

    def lost(self, seen: Sequence[Mapping[str, Any]], step: int) -> str:
        """Return which evaluations that a checkpoint at `step` had seen the folder has lost; empty where none is.

        `seen` is as in the checkpoint. Raises ValueError that names a file which cannot be read.
        """
        ledger, rows = self.folder.ledger("transfer"), ()
        if lines := self.folder.read("transfer", cut=without_items):
            try:
                rows = TransferMatrix.from_lines(lines, until=step).rows
            except ValueError as error:
                raise ValueError(f"{ledger}: {error}") from error
        elif self.folder.transfer.exists():
            rows = TransferMatrix.load(self.folder.transfer).rows
        there = {row.step for row in rows if not row.probe}
        gone = [str(row["step"]) for row in seen if row["step"] not in there and "scores" not in row]
        return f"{ledger} has lost its evaluation at step {', '.join(gone)}" if gone else ""

    def adopt(self, probe: TransferMatrix) -> None:
        """Begin with the rows of a probe of the same held-out items, so that prediction and outcome lie side by side."""
        self.matrix = replace(probe, rows=tuple(row for row in probe.rows if row.probe))

    def save(self) -> None:
        """Bring the transfer file up to its ledger."""
        if self.is_main:
            self.folder.save_transfer()

    def record_draw(self, step: int, choice: Choice) -> None:
        """Write the decision of a draw; `step` is the optimizer step it is for."""
        self._write_reviews(choice.decision.state.get("reviews", []))
        line, samplers = choice.line, {**self.curriculum.spare, **self.curriculum.samplers}
        if self._last_line is None:
            ids = {name: list(sampler.ids) for name, sampler in samplers.items()}
            replace_file(self.folder.prompts, sealed(json.dumps(ids, ensure_ascii=False)))
        places = [choice.places.get(name, []) for name in line["mixture"]]
        # those of a recovery have another scheduler's evidence before and after them, and maybe a domain more
        before = None if choice.recovered or "recovery" in (self._last_line or {}) else self._last_line
        self.folder.append("decisions", {"step": step, **shortened(line, before, places)})
        self._last_line = line

    def record_end(self) -> None:
        """Put what the last stage was expected to reach beside what the last evaluation measured."""
        self._write_reviews(self.curriculum.reviews())

    def _write_reviews(self, reviews: Sequence[Mapping[str, Any]]) -> None:
        if reviews and self.is_main:
            replace_file(self.folder.predicted, json.dumps(list(reviews)))

    def record_refill(self, step: int, refill: Mapping[str, Any]) -> None:
        """Write one refill: per domain the groups that taught nothing, by cause, and the prompts found for them."""
        self.folder.append("refills", {"step": step, **refill})

    def record_heldout(self, step: int, result: HeldoutResult) -> dict[str, float]:
        """Add a row to the transfer matrix, tell the curriculum, return the metrics of this evaluation."""
        row = result.as_evaluation(
            trained=self._trained_since_last(),
            step=step,
            seed=self.seed,
            exposure=self.curriculum.exposure,
            rolled_back=self.curriculum.rolled_back,
            recovery=self.curriculum.recoveries.open is not None,
        )
        if not self.is_by_item:
            row = replace(row, entropy_items={}, kl_items={})
        steer, report = (on_half(row, result.items, which) for which in ("steer", "report"))
        self._add(row, result.items)
        self._published.append(report)
        self.curriculum.record(steer)
        published = replace(result.on("report"), entropy=report.entropy)
        answers = {name: published.read(name) for name in published.answers}
        for c in published.shown if self.is_main else ():
            shown = {"domain": c.prompt.domain, "prompt": c.prompt.prompt, "completion": c.to_read, "score": c.reward}
            turns = {"turns": c.episode.spoken} if c.episode else {}
            self.folder.append("samples", {"step": step, **shown, **turns})
        if self.is_main:
            self.folder.append("evaluations", {"step": step, "domains": _details(answers)})
        return self._metrics(row.trained, published, answers) | grader_failures(result)

    def steer_entropy(self, result: HeldoutResult) -> Mapping[str, Sequence[tuple[float, int]]]:
        """Return, per domain, (nats, tokens) of each item that decides."""
        return (result.on("steer") if self.is_by_item else result).item_entropy

    @property
    def worst_steer_score(self) -> float:
        """The lowest mean score of a trainable domain at the last evaluation, on the half that decides."""
        last = self.curriculum.evaluations[-1]
        return min(last.mean_score(d.name) for d in self.domains if not d.is_watch_only)

    @property
    def _run(self) -> tuple[Evaluation, ...]:
        """The rows of this run, oldest first."""
        return tuple(row for row in self.matrix.rows if not row.probe) if self.matrix else ()

    def practised_last(self) -> tuple[str, ...]:
        """Return what was practised since the last evaluation; where nothing was, what was before it."""
        return self._trained_since_last() or (self._run[-1].trained if self._run else ())

    def _trained_since_last(self) -> tuple[str, ...]:
        """Return the scheduler's stage, where there was one (what it replays is in `exposure`), else all drawn from."""
        if self.curriculum.stage is not None:
            return (self.curriculum.stage,)
        before = self._run[-1].exposure if self._run else {}
        return tuple(name for name, n in self.curriculum.exposure.items() if n > before.get(name, 0))

    def _add(self, row: Evaluation, items: Mapping[str, Sequence[str]]) -> None:
        kept = replace(row, entropy_items={}, kl_items={})
        is_first = not self._run
        if self.matrix is None:
            self.matrix = TransferMatrix(
                domains=tuple(d.name for d in self.domains),
                kinds={d.name: d.kind for d in self.domains},
                rows=(kept,),
                items={name: tuple(ids) for name, ids in items.items()},
                watch_only=tuple(d.name for d in self.domains if d.is_watch_only),
                provenance=dict(self.provenance),
            )
        else:
            self.matrix = self.matrix.with_row(kept)
        if self.is_main:
            head = [self.matrix.head_line()] if is_first else []
            self.folder.append("transfer", *head, row.as_row())

    def _metrics(
        self, trained: Sequence[str], published: HeldoutResult, answers: Mapping[str, Answers]
    ) -> dict[str, float]:
        assert self.matrix is not None
        metrics = heldout_metrics(published, answers, trained=trained, skills=self.skills)
        for name, nats in published.entropy.items():
            base = self._published[0].entropy.get(name, math.nan)
            low, high = (multiple * base for multiple in self.entropy_band)
            metrics[key("heldout", "entropy_place", name)] = place_in_band(nats, (low, high))
            metrics[key("heldout", "entropy_low", name)], metrics[key("heldout", "entropy_high", name)] = low, high
        if len(self._published) > 1:
            now = moment(self._published, watch_only=self.matrix.watch_only)
            for name in published.items:
                for metric, interval in (("bwt", now.bwt[name]), ("drawdown", now.drawdown[name])):
                    metrics[key("transfer", metric, name)] = interval.mid
                    metrics[key("transfer", f"{metric}_low", name)] = interval.low
                    metrics[key("transfer", f"{metric}_high", name)] = interval.high
                metrics[key("transfer", "fwt", name)] = now.fwt[name].mid
            metrics[key("transfer", "bwt")] = now.mean_bwt
            metrics[key("transfer", "drawdown_max")] = now.worst_drawdown
        return defined(metrics)


def heldout_metrics(
    published: HeldoutResult,
    answers: Mapping[str, Answers],
    *,
    trained: Sequence[str] = (),
    skills: Mapping[tuple[str, str], str] | None = None,
) -> dict[str, float]:
    """Return the `heldout/<d>` metrics of what is published of one evaluation, and of its answers.

    `trained` are the domains trained since the one before: their distance to the base model is told apart. `skills` are
    those of items, by domain and id.
    """
    metrics = variety_metrics(published.variety) | (_of_skills(published, skills) if skills else {})
    scores, passed = published.scores(), published.passed()
    for name in published.samples:
        metrics[key("heldout", "score", name)] = mean(graded(scores[name]))
        interval = bounded_mean(scores[name])
        metrics[key("heldout", "score_low", name)], metrics[key("heldout", "score_high", name)] = (
            interval.low,
            interval.high,
        )
        metrics[key("heldout", "pass_at_k", name)] = mean(graded(passed[name]))
        if name in published.entropy:
            metrics[key("heldout", "entropy", name)] = published.entropy[name]
        for metric, value in answers[name].values().items():
            if metric in READ:
                metrics[key("heldout", READ[metric], name)] = value
    if published.base_kl:
        others = [name for name in published.base_kl if name not in trained]
        metrics[key("heldout", "kl_current")] = mean_kl(published.base_kl, trained)
        metrics[key("heldout", "kl_others")] = mean_kl(published.base_kl, others)
    return defined(metrics)


def _of_skills(published: HeldoutResult, skills: Mapping[tuple[str, str], str]) -> dict[str, float]:
    scores: dict[str, list[float | None]] = {}
    pairs: dict[str, list[tuple[float, int]]] = {}
    for name, items in published.scores().items():
        entropy = published.item_entropy.get(name, ())
        for n, item in enumerate(published.items[name]):
            if skill := skills.get((name, item)):
                scores.setdefault(skill, []).append(items[n])
                pairs.setdefault(skill, []).extend(entropy[n : n + 1])
    found = {key("skill", "score", skill): mean(graded(of)) for skill, of in scores.items()}
    return found | {key("skill", "heldout_entropy", skill): per_token(of) for skill, of in pairs.items()}


def grader_failures(result: HeldoutResult) -> dict[str, float]:
    """Return how many samples could not be graded, of all items: what a grader fails on is no score of either half."""
    return {
        key("heldout", "grader_failures", name): float(sum(s is None for item in items for s in item))
        for name, items in result.samples.items()
    }


def _details(answers: Mapping[str, Answers]) -> dict[str, Any]:
    """Return, per domain, every statistic with its interval and the share of each output style."""
    return {
        name: as_lists(read.intervals(resamples=RESAMPLES)) | {"styles": read.styles()}
        for name, read in answers.items()
    }
