"""Synthetic run folders that look like real ones: a few domains with known trends, written file by file.

Domain k starts at 0.25 + 0.1 k; its held-out score rises while it is practised and erodes slowly while others are.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyphony.curricula.records import Evaluation, mean

FOUR = ("arithmetic", "strings", "facts", "stories")


def write_run(
    folder: Path,
    *,
    domains: Sequence[str] = FOUR,
    watch_only: Sequence[str] = ("safety",),
    scheduler: str = "sequential",
    steps: int = 120,
    eval_every: int = 20,
    items: int = 120,
    probes: bool = True,
    extras: bool = True,
    seed: int = 0,
) -> Path:
    """Write a finished run: stages one after the other under `sequential`, fixed shares under any other scheduler."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = [*domains, *watch_only]
    world = _World(names, domains, rng)
    evaluations = [world.evaluate((), 0, items, seed)]
    if probes:
        evaluations += [world.probe(name, steps // 2, items, seed) for name in domains]
    metrics, decisions, samples = [], [], _samples(names, 0, world)
    for step in range(1, steps + 1):
        mixture, stage = _mixture(scheduler, domains, step - 1, steps)
        world.train(mixture, gain=1.5 / steps * len(domains))
        metrics.append({"step": step} | _train_metrics(world, mixture, step, rng, extras))
        decisions.append(_decision(step - 1, mixture, stage, domains))
        if step % eval_every == 0 or step == steps:
            trained = (stage,) if stage else tuple(domains)
            evaluations.append(world.evaluate(trained, step, items, seed))
            metrics[-1] |= {f"heldout/{d}/score": evaluations[-1].mean_score(d) for d in names}
            samples += _samples(names, step, world)
    _write_lines(folder / "metrics.jsonl", metrics)
    _write_lines(folder / "decisions.jsonl", decisions)
    _write_lines(folder / "samples.jsonl", samples)
    if extras:
        alarm = {"step": steps // 2, "domain": domains[0], "kind": "entropy collapse", "message": "below its band"}
        _write_lines(folder / "alarms.jsonl", [alarm])
    (folder / "recipe.yaml").write_text(_recipe(folder.name, domains, watch_only, scheduler, steps, eval_every))
    (folder / "provenance.json").write_text(json.dumps({"versions": {"trl": "1.16.0"}, "commit": "0123abc"}))
    (folder / "transfer.json").write_text(json.dumps(_transfer(names, evaluations, items)))
    (folder / "final").mkdir(exist_ok=True)
    return folder


class _World:
    """Held-out level and entropy of every domain; practising one moves the others a little, by a fixed matrix."""

    def __init__(self, names: Sequence[str], trained: Sequence[str], rng: random.Random) -> None:
        self.names, self.open_ended, self.rng = list(names), trained[-1], rng
        self.level = {name: 0.25 + 0.4 * k / len(names) for k, name in enumerate(names)}
        self.entropy = {name: 0.5 + 0.9 * k / len(names) for k, name in enumerate(names)}
        self.transfer = {(a, b): rng.uniform(-0.25, 0.1) for a in trained for b in names if a != b}
        self.difficulty = {name: rng.random() for name in names}

    def train(self, mixture: Mapping[str, float], gain: float) -> None:
        for name in self.names:
            own = mixture.get(name, 0.0) * (0.95 - self.level[name])
            others = sum(p * self.transfer.get((a, name), 0.0) for a, p in mixture.items() if a != name)
            self.level[name] = min(0.98, max(0.02, self.level[name] + gain * (own + 0.5 * others)))
            drift = 0.2 if name == self.open_ended else -0.5
            self.entropy[name] *= 1 + gain * drift * mixture.get(name, 0.0)

    def probe(self, name: str, steps: int, items: int, seed: int) -> Evaluation:
        level, entropy = dict(self.level), dict(self.entropy)
        for _ in range(steps):
            self.train({name: 1.0}, gain=0.8 / steps)
        row = self.evaluate((name,), steps, items, seed, probe=True)
        self.level, self.entropy = level, entropy
        return row

    def evaluate(
        self, trained: tuple[str, ...], step: int, items: int, seed: int, *, probe: bool = False
    ) -> Evaluation:
        # an item's own difficulty is the same at every evaluation, so paired intervals are narrower than unpaired ones
        scores = {}
        for name in self.names:
            draws = random.Random(f"{seed}/{name}")
            shifts = [draws.gauss(0, 0.25) for _ in range(items)]
            rates = [min(1.0, max(0.0, self.level[name] + shift)) for shift in shifts]
            scores[name] = tuple(sum(self.rng.random() < rate for _ in range(4)) / 4 for rate in rates)
        entropy = {name: h * self.rng.uniform(0.97, 1.03) for name, h in self.entropy.items()}
        return Evaluation(trained=trained, step=step, seed=seed, scores=scores, entropy=entropy, probe=probe)


def _mixture(scheduler: str, domains: Sequence[str], draw: int, draws: int) -> tuple[dict[str, float], str | None]:
    if scheduler == "sequential":
        stage = domains[draw * len(domains) // draws]
        return {name: float(name == stage) for name in domains}, stage
    waves = [1.2 + math.sin(6.28 * (draw / draws + k / len(domains))) for k in range(len(domains))]
    return {name: wave / sum(waves) for name, wave in zip(domains, waves, strict=True)}, None


def _train_metrics(
    world: _World, mixture: Mapping[str, float], step: int, rng: random.Random, extras: bool
) -> dict[str, float]:
    drawn = [name for name, p in mixture.items() if p > 0]
    row: dict[str, float] = {
        "reward": mean([world.level[name] for name in drawn]) + rng.gauss(0, 0.03),
        "entropy": mean([world.entropy[name] for name in drawn]),
        "loss": rng.gauss(0, 0.02),
        "grad_norm": abs(rng.gauss(0.8, 0.2)),
        "step_time": rng.uniform(0.9, 1.4),
        "completions/mean_length": 40 + 10 * math.sin(step / 9),
        "sampling/sampling_logp_difference/mean": abs(rng.gauss(1e-3, 2e-4)),
    }
    for name in drawn:
        reward = min(1.0, max(0.0, world.level[name] + rng.gauss(0, 0.08)))
        dead = min(1.0, max(0.0, 0.2 + abs(reward - 0.5)))
        row |= {
            f"domain/{name}/reward": reward,
            f"domain/{name}/entropy": world.entropy[name] * rng.uniform(0.93, 1.07),
        }
        row |= {f"domain/{name}/frac_dead": dead, f"domain/{name}/mean_length": 40 + rng.gauss(0, 3)}
        row |= {f"domain/{name}/dead_correct": reward * dead, f"domain/{name}/dead_wrong": (1 - reward) * dead}
        row |= {f"domain/{name}/n": 8 * round(8 * mixture[name]), f"domain/{name}/dead_completions": dead}
    if extras:
        row |= _extra_metrics(world, mixture, rng)
    return row


def _extra_metrics(world: _World, mixture: Mapping[str, float], rng: random.Random) -> dict[str, float]:
    row = {"rollout/useful_token_frac": rng.uniform(0.5, 0.8), "rollout/refill_rounds": float(rng.randrange(3))}
    row["rollout/tokens_per_s"] = rng.uniform(700, 900)
    for name in mixture:
        mastered = round(200 * world.level[name] ** 2)
        row |= {f"curriculum/{name}/mastered": mastered, f"curriculum/{name}/impossible": 12}
        row |= {f"curriculum/{name}/deferred": 30, f"curriculum/{name}/active": 258 - mastered}
    last = list(mixture)[-1]
    row |= {f"diversity/{last}/classes": 3 + 2 * rng.random(), f"diversity/{last}/mean": rng.uniform(0.4, 0.6)}
    row |= {f"shortcuts/{name}/repeated_ngrams": rng.uniform(0, 0.05) for name in mixture}
    return row


def _decision(draw: int, mixture: Mapping[str, float], stage: str | None, domains: Sequence[str]) -> dict[str, Any]:
    reason = "follows a slow wave"
    if stage is not None:
        reason = f"stage {domains.index(stage) + 1} of {len(domains)}: {stage}"
    counts = {name: round(8 * p) for name, p in mixture.items()}
    evidence = {"draw": draw}
    return {
        "draw": draw,
        "step": draw,
        "mixture": dict(mixture),
        "counts": counts,
        "reason": reason,
        "stage": stage,
    } | {"evidence": evidence}


def _samples(names: Sequence[str], step: int, world: _World) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "domain": name,
            "prompt": f"Question {n} about {name}: is 1 < 2 & 3?",
            "completion": f"After {step} steps I say <answer {n}>.",
            "score": round(world.level[name], 2),
        }
        for name in names
        for n in (1, 2)
    ]


def _recipe(
    name: str, domains: Sequence[str], watch_only: Sequence[str], scheduler: str, steps: int, eval_every: int
) -> str:
    lines = [f"name: {name}", "model: launch/lab/policy", "algorithm: grpo", "domains:"]
    for domain in domains:
        kind = "open_ended" if domain == domains[-1] and len(domains) > 1 else "structured"
        files = f"train: data/{domain}.jsonl, heldout: data/{domain}_test.jsonl"
        lines.append(f"  {domain}: {{kind: {kind}, {files}, reward: exact}}")
    lines += [f"  {d}: {{kind: structured, heldout: data/{d}_test.jsonl, reward: exact}}" for d in watch_only]
    lines += [f"curriculum: {{scheduler: {scheduler}}}", "entropy: {band: [0.5, 1.5]}"]
    return "\n".join([*lines, f"eval: {{every: {eval_every}}}", f"grpo: {{max_steps: {steps}, seed: 0}}", ""])


def _transfer(names: Sequence[str], evaluations: Sequence[Evaluation], items: int) -> dict[str, Any]:
    return {
        "version": 1,
        "domains": list(names),
        "kinds": dict.fromkeys(names, "structured"),
        "items": {name: [f"{name}-{n}" for n in range(items)] for name in names},
        "rows": [evaluation.as_row() for evaluation in evaluations],
    }


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
