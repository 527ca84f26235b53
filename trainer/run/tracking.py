"""Weights & Biases: the same keys as `metrics.jsonl`, one W&B step a line. Offline unless the recipe says otherwise.

Everything is handed to a thread of its own, so that the run never waits: not for a server that does not answer, and at
the end no longer than `FINISH_S`. A server that cannot be reached at the start makes the run an offline one, whose files
`wandb sync` uploads later.

Each resume of an offline run adds a folder with the same id, and `wandb sync RUN/wandb` (0.31) sends them in the order of
their beginning to one run. It makes later steps of those that the server has already, so an offline run is told of a step
only once a checkpoint keeps it. What W&B had not written when a run was killed, up to its last seconds before a checkpoint,
is missing there; `metrics.jsonl` has it.

Beside the numbers it gets tables: completions by domain, decisions, and what each domain did to each.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import wandb

from polyphony.curricula.transfer.effects import Effects
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.trainer.evaluation.result import HeldoutResult
from polyphony.trainer.run import visible
from polyphony.trainer.run.folder import RunFolder
from polyphony.trainer.run.json_lines import read_object, write_object
from polyphony.trainer.settings import WandbSettings

logger = logging.getLogger(__name__)


MOST_ROWS = 2000
"""Of the decisions: every so-manieth, so that a table stays one that a browser can show."""


def track_completions(tracker: WandbTracker, step: int, result: HeldoutResult) -> None:
    """Log the samples that are kept for people, to be filtered by domain."""
    rows = [
        [step, c.prompt.domain, visible(_text(c.prompt.prompt)), visible(c.to_read), c.reward, c.truncated]
        for c in result.shown
    ]
    tracker.log_table(step, "completions", ["step", "domain", "prompt", "completion", "score", "truncated"], rows)


def track_decisions(tracker: WandbTracker, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
    """Log the scheduler's decisions: a row a draw, a column a domain's share, and the reason."""
    if not lines:
        return
    names = list(lines[0]["mixture"])
    every = -(-len(lines) // MOST_ROWS)
    rows = [
        [line["step"], line["draw"], *(line["mixture"][n] for n in names), line["stage"] or "", line["reason"]]
        for line in lines[::every]
    ]
    tracker.log_table(step, "decisions", ["step", "draw", *names, "stage", "reason"], rows)


def track_transfer(tracker: WandbTracker, step: int, matrix: TransferMatrix) -> None:
    """Log what training on each domain did to each (`report` half), as a table with intervals and as a heatmap; beyond what
    shuffled rewards did, where that was measured."""
    effects = Effects(matrix.on("report"), against="placebo")
    if not effects.trained:
        return
    table, (low, high) = effects.transfer(), effects.transfer_interval()
    rows = [
        [source, target, float(table[j, i]), float(low[j, i]), float(high[j, i])]
        for j, source in enumerate(effects.trained)
        for i, target in enumerate(effects.domains)
    ]
    tracker.log_table(step, "transfer", ["trained", "measured", "change", "low", "high"], rows)
    cells = [(row[0], row[1], row[2]) for row in rows]
    beyond = ", beyond shuffled rewards" if matrix.placebo else ""
    tracker.log_heatmap(step, "transfer_heatmap", f"What training on one domain did to the others{beyond}", cells)


def _text(prompt: str | list[dict[str, Any]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(str(m.get("content") or "") for m in prompt)


REACH_S = 5.0
"""Seconds a server may take to give any sign of life before the run is tracked offline."""


FINISH_S = 20.0
"""Seconds the end of a run waits for uploads; what is left then stays on disk."""


def _SAVED(run: Any) -> None:  # noqa: N802 (a mark among tasks, that does nothing)
    """After this task an offline run may hold what was logged before."""


class WandbTracker:
    """Hand metrics and tables to one W&B run, from a thread that the run does not wait for.

    Example: `tracker.log(3, {"reward": 0.5}); tracker.log_table(3, "samples", ["domain", "score"], [["math", 1.0]])`
    """

    def __init__(self, settings: WandbSettings, *, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        # W&B's own error reports go to servers of others, and a process waits for them at its exit
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self.settings = settings
        self._given = {"project": settings.project, "entity": settings.entity, "name": name, "config": dict(config)}
        self._known = known_as(RunFolder(folder))
        self._folder = folder
        self._has_failed = False
        self._tasks: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)

    def begin(self) -> None:
        """Write down as what W&B knows the run, and start; until then nothing is written, and what is logged waits."""
        write_object(RunFolder(self._folder).tracked, {name: self._known[name] for name in ("id", "group", "tags")})
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log numbers at a step."""
        numbers = dict(metrics)
        self._tasks.put(lambda run: run.log(numbers, step=step))

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table at a step; W&B lets a person filter and group it by any column."""
        self._tasks.put(lambda run: run.log({name: wandb.Table(columns=list(columns), data=list(rows))}, step=step))

    def log_heatmap(self, step: int, name: str, title: str, cells: Sequence[tuple[str, str, float]]) -> None:
        """Log cells (row, column, value) as a heatmap, with W&B's preset for tables of two names and a number."""
        fields = {"Actual": "trained", "Predicted": "measured", "nPredictions": "change"}

        def draw(run: Any) -> None:
            table = wandb.Table(columns=list(fields.values()), data=[list(cell) for cell in cells])
            chart = wandb.plot_table("wandb/confusion_matrix/v1", table, fields, {"title": title})
            run.log({name: chart}, step=step)

        self._tasks.put(draw)

    def alert(self, title: str, text: str) -> None:
        """Have W&B tell its user."""
        self._tasks.put(lambda run: run.alert(title=title, text=text))

    def saved(self) -> None:
        """Say that a checkpoint keeps what was logged until now, so that no resume will tell it again."""
        self._tasks.put(_SAVED)

    def finish(self) -> None:
        """Wait for what is still to be written, but no longer than `FINISH_S`."""
        self._tasks.put(None)
        self._thread.join(FINISH_S)
        if self._thread.is_alive():
            logger.warning(
                "W&B is still uploading; what is left can be sent with: wandb sync %s", RunFolder(self._folder).wandb
            )

    def _serve(self) -> None:
        run = self._start()
        self._say_offline(run)
        held: list[Callable[[Any], None]] = []
        while (task := self._tasks.get()) is not None:
            if run is None:
                continue
            held.append(task)
            if task is _SAVED or run.settings.mode != "offline":
                self._do(held, run)
        if run is not None:
            self._do([*held, lambda run: run.finish()], run)

    def _do(self, tasks: list[Callable[[Any], None]], run: Any) -> None:
        for task in tasks:
            self._try(task, run)
        tasks.clear()

    def _try(self, task: Callable[[Any], None], run: Any) -> None:
        """Do one thing; whatever W&B raises is W&B's, is told once, and the run goes on."""
        try:
            task(run)
        except Exception as error:  # W&B may raise anything; the metrics are on disk all the same
            if not self._has_failed:
                logger.warning("W&B failed (%s: %s); metrics are in metrics.jsonl", type(error).__name__, error)
            self._has_failed = True

    def _start(self) -> Any:
        mode = self.settings.mode
        if mode == "online" and not is_reachable(server_url()):
            logger.warning(
                "W&B cannot be reached; tracked offline. Later: wandb sync %s", RunFolder(self._folder).wandb
            )
            mode = "offline"
        try:
            return self._init(mode)
        except wandb.Error as error:
            logger.warning("W&B cannot start %s (%s)", mode, error)
        try:
            return self._init("offline") if mode == "online" else None
        except wandb.Error as error:
            logger.warning("W&B cannot start offline (%s); metrics are in metrics.jsonl", error)
            return None

    def _say_offline(self, run: Any) -> None:
        if "resume" in self._known and run is not None and run.settings.mode == "offline":
            where = RunFolder(self._folder).wandb
            logger.warning("W&B: this resume is one more part of an offline run; all as one: wandb sync %s", where)

    def _init(self, mode: Literal["online", "offline", "disabled"]) -> Any:
        settings = wandb.Settings(console="off", init_timeout=30, finish_timeout=FINISH_S)
        return wandb.init(
            mode=mode, dir=str(self._folder), reinit="create_new", settings=settings, **self._given, **self._known
        )


def known_as(folder: RunFolder) -> dict[str, Any]:
    """Return id, group and tags of a run for W&B: those of its first start, kept in its folder, else as W&B's variables say.

    So a resumed run is the same run there, and its steps that were discarded are not told twice.
    """
    path, env = folder.tracked, os.environ
    kept = read_object(path) if path.is_file() else {}
    tags = [tag for tag in env.get("WANDB_TAGS", "").split(",") if tag]
    return {
        "id": kept.get("id") or env.get("WANDB_RUN_ID") or secrets.token_hex(4),
        "group": env.get("WANDB_RUN_GROUP") or kept.get("group"),
        "tags": tags or kept.get("tags"),
        **({"resume": "allow"} if kept else {}),
    }


def server_url() -> str:
    """Return where W&B is, by its own environment variables."""
    settings = wandb.Settings()
    settings.update_from_system_settings()
    settings.update_from_env_vars(dict(os.environ))
    return settings.base_url


def is_reachable(url: str) -> bool:
    """Say whether a server answers at all, within `REACH_S`; an error page is an answer."""
    try:
        urllib.request.urlopen(url, timeout=REACH_S).close()
    except urllib.error.HTTPError:
        return True
    except OSError:  # refused, timed out, no such host
        return False
    return True
