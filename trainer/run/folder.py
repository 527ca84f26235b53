"""What a run leaves: every name in its folder, its ledgers appended line by line and cut on resume, and how it ended.

No other file knows these names. Imports no torch: the folder is claimed, read and reported without it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from polyphony.curricula.decision_log import choices, wholes
from polyphony.curricula.files import replace_file, replacing, unsealed
from polyphony.curricula.transfer.matrix import TransferMatrix, copy_document
from polyphony.trainer.run.changes import flat, may_change
from polyphony.trainer.run.json_lines import (
    as_lines,
    each_line,
    read_lines,
    read_object,
    uncollected,
    whole_lines,
)

LEDGERS = ("metrics", "decisions", "refills", "samples", "alarms", "evaluations", "transfer")
"""The line-by-line files; each line has the `step` it belongs to."""
STATE_FILE = "polyphony.json"
"""Written last into a checkpoint, which is whole by it."""
UNFINISHED_FILE = "polyphony.json.unfinished"
"""In a checkpoint while it is being saved, and for ever in one that was cut off."""
BEST_FILE = "best.json"
"""Beside the checkpoints: which one is best."""
BEST_BY_DOMAIN_FILE = "best_by_domain.json"
"""Beside the checkpoints: which one is best of each domain that a guardrail distils from it."""
POOL_FILE = "pool.npz"
"""What is known of the training prompts: in a run's folder, in its checkpoints, and in the folder of a screen."""


def ahead_file(rank: int) -> str:
    """Return the name of the file in a checkpoint that has a rank's draws which were generated ahead."""
    return f"ahead-{rank}.json"


class Interrupted(SystemExit):
    """A signal ended the run after its checkpoint was saved: no error; uncaught, the process ends as signals end one."""

    def __init__(self, number: int, step: int, *, is_saved: bool = True) -> None:
        """Without `is_saved`, what was generated ahead did not end in time: `step` is that of an older checkpoint, or 0."""
        super().__init__(128 + number)
        self.number = number
        self.step = step
        self.is_saved = is_saved

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        if self.is_saved:
            return f"{name}: checkpoint at step {self.step} saved"
        return f"{name}: draws in flight did not end in time and are dropped; the run goes on from step {self.step}"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run. Its ledgers are appended a line at a time; its whole files are for `replace_file`.

    Example: `RunFolder(Path("runs/demo")).read("metrics")[-1]["step"]`
    """

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe; a run from Python has `settings`."""
        return self.path / "recipe.yaml"

    @property
    def settings(self) -> Path:
        """What a run from Python was made with, under a recipe's keys; under `script` those that only its script knows."""
        return self.path / "settings.json"

    @property
    def lock(self) -> Path:
        """Locked by the process that writes here; where it is, the folder was claimed for a run."""
        return self.path / ".lock"

    @property
    def provenance(self) -> Path:
        """Versions, hashes, and under `imports_from` the folders where modules of the user's were found."""
        return self.path / "provenance.json"

    @property
    def transfer(self) -> Path:
        """Per-item scores of every evaluation, that of a probe is named alike; of a run, as of its last checkpoint: the
        ledger `transfer` is ahead of it, see `read_transfer`."""
        return self.path / "transfer.json"

    @property
    def base(self) -> Path:
        """What the base model said to some held-out prompts."""
        return self.path / "base.json"

    @property
    def predicted(self) -> Path:
        """After each planned stage, what was expected and what came."""
        return self.path / "predicted.json"

    @property
    def prompts(self) -> Path:
        """Ids of the training rows by domain, which the decisions name by their places."""
        return self.path / "prompts.json"

    @property
    def pool(self) -> Path:
        return self.path / POOL_FILE

    @property
    def end(self) -> Path:
        """How the run ended; absent while it runs, and after an interruption or a failure: then it can go on."""
        return self.path / "end.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The name of the checkpoint whose worst trained domain is best, and that score."""
        return self.checkpoints / BEST_FILE

    @property
    def final(self) -> Path:
        """The trained policy, for `from_pretrained`."""
        return self.path / "final"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def logs(self) -> Path:
        """Where a batch system writes to, before the run begins already."""
        return self.path / "logs"

    @property
    def wandb(self) -> Path:
        """Where W&B keeps its own files."""
        return self.path / "wandb"

    @property
    def tracked(self) -> Path:
        """The id, group and tags by which W&B knows the run, however often it is resumed."""
        return self.path / "wandb.json"

    @property
    def screened(self) -> Path:
        """The summary of a screen, whose ledgers are `answers` and `impossible`."""
        return self.path / "screen.json"

    @property
    def sampled(self) -> Path:
        """The summary of a sample of experts' answers, whose ledger is `sampled`."""
        return self.path / "sample.json"

    @property
    def rows(self) -> Path:
        """What a sample has accepted, a row an answer."""
        return self.ledger("rows")

    def ledger(self, name: str) -> Path:
        """Return the line-by-line file of that name."""
        return self.path / f"{name}.jsonl"

    @property
    def holds_run(self) -> bool:
        """Whether a run has begun here."""
        written = (self.transfer, *map(self.ledger, LEDGERS), *self.checkpoints.glob(f"*/{STATE_FILE}"))
        return any(path.exists() for path in written)

    @property
    def is_free(self) -> bool:
        """Whether there is nothing but what a batch system writes, and what a trainer leaves that never trained."""
        of_claim = self._of_claim if self.lock.is_file() and not self.holds_run else ()
        found = (path for path in self.path.rglob("*") if path.is_file() and self.logs not in path.parents)
        return not any(path not in of_claim and not {self.wandb, *of_claim} & {*path.parents} for path in found)

    @property
    def _of_claim(self) -> tuple[Path, ...]:
        """What is written before a run begins."""
        return (self.lock, self.recipe, self.settings, self.provenance, self.prompts, self.tracked, self.wandb)

    @property
    def users_own(self) -> list[Path]:
        """What is of the user's own in a folder that nobody has claimed: other runs' files of W&B."""
        return [] if self.lock.exists() else [path for path in self._of_claim if path.exists()]

    def give_up(self, *, keep: Collection[Path] = ()) -> None:
        """Take away what was written for a run that never began, so that the name is free; all else stays, and `keep`."""
        for path in (path for path in reversed(self._of_claim) if path not in keep):  # the lock last
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in (self.checkpoints, self.path):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()

    @contextmanager
    def locked(self, *, say: Callable[[str], None]) -> Iterator[None]:
        """Keep other processes from writing here meanwhile, those of other machines too; readers need not ask.

        The system unlocks when the process ends, however it ends. Within one process a second lock is the first. Raises
        ValueError where another process has it.
        """
        place = self.path.resolve()
        if place in _LOCKED:
            yield
            return
        with self.lock.open("a+") as file:
            self._take_lock(file.fileno(), say)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            _LOCKED[place] = file.fileno()
            try:
                yield
            finally:
                del _LOCKED[place]

    @property
    def is_left(self) -> bool | None:
        """Whether the process that wrote here last has ended, or is this one, which reads; None where that is not seen."""
        if self.path.resolve() in _LOCKED:
            return True
        words = self.lock.read_text().split() if self.lock.is_file() else []
        if len(words) != 4 or words[3] != socket.gethostname():
            return None
        try:
            os.kill(int(words[1]), 0)
        except (ProcessLookupError, PermissionError) as error:
            return isinstance(error, ProcessLookupError)
        return False

    def _take_lock(self, descriptor: int, say: Callable[[str], None]) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            by = self.lock.read_text() or "another process"
            raise ValueError(
                f"run folder {self.path} is in use by {by}: wait for its end, or choose another"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            say(f"run folder {self.path}: its file system has no locks; see to it that no second process writes there")
        if not os.fstat(descriptor).st_nlink:  # given up between opening and locking
            raise ValueError(f"run folder {self.path} was in use until just now: start again")

    def claim(self, recipe: str) -> None:
        """Write a run's recipe, with its digest."""
        self.settings.unlink(missing_ok=True)  # of a script whose run never began
        digest = hashlib.sha256(recipe.encode()).hexdigest()
        replace_file(self.recipe, f"{_DIGEST}{digest}\n{recipe}")

    def check_recipe(self) -> None:
        """Raise ValueError where the recipe is not what was written; without a digest, of older versions, it is taken."""
        text = self.recipe.read_bytes()
        first, _, rest = text.partition(b"\n")
        if first.startswith(_DIGEST.encode()) and first != _DIGEST.encode() + hashlib.sha256(rest).hexdigest().encode():
            raise ValueError(
                f"{self.recipe} is not as the run wrote it: damaged, or edited; what may change goes on the command line, "
                f"--resume {self.path} key=value"
            )

    def refuse_other(self, settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return which settings of a run from Python are others now; none for a free folder.

        Raises ValueError for a folder that holds anything else, and where they may not change.
        """
        if self.holds_run and self.settings.is_file():
            return self.changed(read_object(self.settings), settings)
        if self.recipe.is_file() or not self.is_free:
            what = "holds the run of a recipe: --resume goes on with it;" if self.recipe.is_file() else "is not empty;"
            raise ValueError(f"run folder {self.path} {what} choose another")
        return {}

    def changed(self, then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return the settings that differ, by their key paths. Raises ValueError for one that may not."""
        before, after = flat(then), flat(now)
        keys = [key for key in sorted(before | after) if before.get(key) != after.get(key)]
        if refused := [key for key in keys if may_change(key) is None]:
            others = ", ".join(f"{key}={before.get(key)!r}, now it is {after.get(key)!r}" for key in refused)
            raise ValueError(
                f"run folder {self.path} holds a run with {others}: go on with what it was made with, or choose another"
            )
        return {key: (before.get(key), after.get(key)) for key in keys}

    def append(self, name: str, *entries: Mapping[str, Any]) -> None:
        """Add lines to a ledger; they are in the system's hands when this returns, so a kill loses nothing."""
        lines = as_lines(entries, is_sealed=name in _SEALED)
        with self.ledger(name).open("a", encoding="utf-8") as file:
            file.write(lines)

    def begin(self, name: str, *entries: Mapping[str, Any]) -> None:
        """Write a ledger anew."""
        replace_file(self.ledger(name), as_lines(entries, is_sealed=name in _SEALED))

    def read(
        self, name: str, broken: list[int] | None = None, cut: Callable[[bytes], bytes] = bytes
    ) -> list[dict[str, Any]]:
        """Return a ledger's lines, as `read_lines` does; none where the file is absent."""
        path = self.ledger(name)
        return read_lines(path, broken, cut) if path.exists() else []

    def decisions(self, broken: list[int] | None = None) -> list[dict[str, Any]]:
        """Return a whole line a draw, as `decision_log.decision_line` made it; `broken` as for `read_lines`."""
        ids = read_object(self.prompts) if self.prompts.is_file() else {}
        return self._told(lambda lines: wholes(lines, ids, is_lenient=broken is not None), broken)

    def choices(self, broken: list[int] | None = None) -> list[dict[str, Any]]:
        """Return what was decided for each draw, without the evidence and the prompts: a third of the time, and of room."""
        return self._told(lambda lines: choices(lines, is_lenient=broken is not None), broken)

    def _told(self, tell: Callable[[Iterable[dict[str, Any]]], list], broken: list[int] | None) -> list[dict[str, Any]]:
        path = self.ledger("decisions")
        try:
            with uncollected():
                return tell(each_line(path, broken) if path.exists() else [])
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, ValueError) and str(path) in str(error):
                raise
            raise ValueError(
                f"{path}: {error if isinstance(error, ValueError) else f'a line lacks {error}'}"
            ) from error

    def save_transfer(self) -> None:
        """Bring `transfer` up to its ledger, where there is one."""
        if _holds_lines(self.ledger("transfer")):
            path = self.ledger("transfer")
            try:
                with path.open("rb") as ledger, replacing(self.transfer, "wb") as out:
                    copy_document(ledger, out)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error

    def record_end(self, how: Literal["finished", "stopped"], *, why: str, step: int) -> None:
        """Say that the run is over, after which step, and why."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        replace_file(self.end, json.dumps({"how": how, "why": why, "step": step, "at": at}))

    @property
    def has_ended(self) -> bool:
        """Whether the run is over; one that was interrupted or killed is not, nor is one that has been taken up again."""
        return self.end.is_file()

    def sizes(self) -> dict[str, int]:
        """Return how many bytes each ledger has."""
        return {name: path.stat().st_size for name in LEDGERS if (path := self.ledger(name)).exists()}

    def cut(
        self,
        step: int,
        *,
        sizes: Mapping[str, int] | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> Path | None:
        """Take all lines after `step` out of the ledgers and keep them as `attempt-<n>`; return that folder, if any."""
        return self.put_aside(self.tails(step, sizes=sizes, say=say))

    def tails(
        self,
        step: int,
        *,
        sizes: Mapping[str, int] | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> dict[str, tuple[bytes, bytes]]:
        """Return what stays and what goes of each ledger that has lines after `step`; nothing is written.

        What goes has the summary of a training that ended: it is written after the last checkpoint. With `sizes`, it has too
        what of `step` itself stands beyond so many bytes of each ledger. Says which last line had been cut off. Raises
        ValueError that names the file and the line.
        """
        tails, cut_off = {}, []
        for name in LEDGERS:
            path = self.ledger(name)
            text = path.read_bytes() if path.exists() else b""
            whole, entries = whole_lines(text), self.read(name)
            most = len(whole) if sizes is None else len(whole_lines(text[: sizes.get(name, 0)]))
            kept = [
                line
                for n, (line, entry) in enumerate(zip(whole, entries, strict=True), 1)
                if _step(entry, f"{path}: line {n}") <= step and SUMMARY not in entry and n <= most
            ]
            if len(whole) < len(lines := [line for line in text.split(b"\n") if line.strip()]):
                cut_off.append(f"{path}: line {len(lines)}, the last, was cut off while being written; it is taken out")
            head = b"".join(line + b"\n" for line in kept)
            if head != text:
                tails[name] = (head, text[len(head) :] if text.startswith(head) else text)
        for line in cut_off:
            say(line)
        return tails

    def put_aside(self, tails: Mapping[str, tuple[bytes, bytes]]) -> Path | None:
        """Leave of each ledger what stays; return the folder that has the rest, None where there is none."""
        if not tails:
            return None
        attempt = RunFolder(self._new_attempt())
        for name, (head, tail) in tails.items():
            replace_file(attempt.ledger(name), tail)
            replace_file(self.ledger(name), head)
        if self.transfer.exists() and not _holds_lines(self.ledger("transfer")):
            # of a version that kept no ledger of it, or of rows that are all gone
            replace_file(attempt.transfer, self.transfer.read_bytes())
        return attempt.path

    def _new_attempt(self) -> Path:
        numbers = [path.name.removeprefix("attempt-") for path in self.path.glob("attempt-*")]
        n = max((int(number) for number in numbers if number.isdecimal()), default=0)
        attempt = self.path / f"attempt-{n + 1}"
        attempt.mkdir()
        return attempt


_LOCKED: dict[Path, int] = {}
"""Folders that this process has locked, and by which descriptors."""
# a fork would hold the lock after its parent's end
os.register_at_fork(after_in_child=lambda: [os.close(_LOCKED.pop(place)) for place in [*_LOCKED]])
_DIGEST = "# of the lines below: sha256 "
_SEALED = ("transfer",)
"""The ledgers that a run decides by: each of their lines has its digest."""
SUMMARY = "train_runtime"
"""What tells the line in which Transformers sums up a training that ended."""


def _step(entry: Mapping[str, Any], where: str) -> float:
    step = entry.get("step")
    if not isinstance(step, int | float) or isinstance(step, bool):
        raise ValueError(f"{where} has no step, got {step!r}")
    return step


def read_transfer(path: Path) -> TransferMatrix:
    """Return what a transfer file says; of a run that goes on, what its ledger says. Nothing is written.

    Raises FileNotFoundError, and ValueError that names the file where it is not valid.
    """
    folder = RunFolder(path.parent)
    ledger = folder.ledger("transfer")
    if path.name != folder.transfer.name or not _holds_lines(ledger):
        return TransferMatrix.load(path)
    try:
        return TransferMatrix.from_lines(read_lines(ledger, cut=unsealed))
    except ValueError as error:
        raise ValueError(str(error) if str(ledger) in str(error) else f"{ledger}: {error}") from error


def holds_transfer(path: Path) -> bool:
    """Whether `read_transfer` finds anything."""
    folder = RunFolder(path.parent)
    return path.is_file() or (path.name == folder.transfer.name and _holds_lines(folder.ledger("transfer")))


def _holds_lines(ledger: Path) -> bool:
    return ledger.is_file() and ledger.stat().st_size > 0
