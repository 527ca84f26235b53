"""Signals, disks that are full: the last good checkpoint stays and the run can go on."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from polyphony.launch.cli import main
from polyphony.trainer.checkpoints import whole_or_none
from polyphony.trainer.run.folder import STATE_FILE
from polyphony.trainer.run.stopping import StopOnSignal, say
from polyphony.trainer.slots import DrawPlan
from tests.conftest import RECIPES
from tests.forks import Fork

QUICK = ["rollouts.engine=transformers", "tracking.wandb=null"]
RECIPE = [str(RECIPES / "debug.yaml"), *QUICK, "grpo.max_steps=400", "checkpoint.every=400", "eval.every=400"]


def stopper(*, micro_batches_per_draw: int = 4, agree=lambda number: number) -> StopOnSignal:
    plan = DrawPlan(
        prompts_per_draw=1, draws=5, steps=10, micro_batches_per_draw=micro_batches_per_draw, micro_batches_per_step=2
    )
    return StopOnSignal(plan, grace_s=30, agree=agree)


def after(step: int, callback: StopOnSignal) -> tuple[bool, bool]:
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    callback.on_step_end(None, SimpleNamespace(global_step=step, max_steps=10), control)
    return control.should_save, control.should_training_stop


def test_a_signal_waits_for_the_end_of_the_draw():
    listener = stopper()  # a draw spans two steps
    assert after(2, listener) == (False, False)
    listener.received = signal.SIGTERM
    assert after(3, listener) == (False, False)
    assert after(4, listener) == (True, True)
    assert listener.stopped == (signal.SIGTERM, 4)


def test_a_signal_that_reached_another_rank_stops_this_one_too():
    listener = stopper(agree=lambda number: max(number, signal.SIGTERM))
    assert after(2, listener) == (True, True)


def test_a_run_that_is_done_anyway_is_not_called_interrupted():
    listener = stopper()
    listener.received = signal.SIGINT
    assert after(10, listener) == (False, False)
    assert listener.stopped is None


def test_a_checkpoint_that_cannot_be_finished_leaves_the_last_one(tmp_path):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-1" / STATE_FILE).write_text("{}")
    with (
        pytest.raises(
            RuntimeError, match=r"checkpoint-2 could not be saved .* last complete checkpoint is checkpoint-1"
        ),
        whole_or_none(tmp_path / "checkpoint-2"),
    ):
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def started(folder) -> Fork:
    """Start a run and wait until it has taken a step."""
    process = Fork(main, ["train", *RECIPE, "--out", str(folder)], log=folder.parent / "log")
    deadline = time.monotonic() + 300
    while process.is_running and time.monotonic() < deadline:
        path = folder / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= 2:
            return process
        time.sleep(0.05)
    raise AssertionError(f"the run took no step: {process.said[-2000:]}")


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_that_the_run_goes_on_from(tmp_path):
    process = started(tmp_path / "run")
    process.send(signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert f"SIGTERM: checkpoint at step {last} saved; go on with --resume" in process.said.splitlines()[-1]
    assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{last}" / "polyphony.json").exists()
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.slow
def test_two_interrupts_end_at_once(tmp_path):
    process = started(tmp_path / "run")
    process.send(signal.SIGINT)
    time.sleep(0.02)  # far less than a step takes
    process.send(signal.SIGINT)
    sent = time.monotonic()
    assert process.wait(60) == 130
    assert time.monotonic() - sent < 10
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


@pytest.mark.slow
def test_a_disk_that_fills_up_while_saving_leaves_the_last_good_checkpoint(tmp_path, capsys):
    """The limit on file sizes makes the optimizer's file fail to be written, as a full disk would."""
    run = tmp_path / "run"
    overrides = [*QUICK, "grpo.max_steps=2", "checkpoint.every=1", "eval.every=2"]
    from polyphony.trainer.grpo import DomainGRPOTrainer

    true_save = DomainGRPOTrainer._save_checkpoint
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails instead of ending the process

    def save(self, *arguments):
        if self.state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, unlimited[1]))  # the weights fit, the moments do not
        return true_save(self, *arguments)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DomainGRPOTrainer, "_save_checkpoint", save)
            code = main(["train", str(RECIPES / "debug.yaml"), *overrides, "--out", str(run)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    assert code == 1
    assert "the last complete checkpoint is checkpoint-1" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in (run / "checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]
    assert main(["train", "--resume", str(run)]) == 0


def test_a_second_interrupt_ends_at_once_and_so_does_a_draw_that_takes_too_long(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    listener = stopper()
    listener._hear(signal.SIGINT, None)
    assert ended == [] and "once more to end at once" in capsys.readouterr().err
    listener._hear(signal.SIGINT, None)
    assert ended == [128 + signal.SIGINT]
    listener._give_up(signal.SIGTERM)
    assert len(ended) == 1  # it no longer trains
    listener._before = {signal.SIGTERM: signal.SIG_DFL}
    listener._give_up(signal.SIGTERM)
    assert ended[1:] == [128 + signal.SIGTERM] and "ending without a new checkpoint" in capsys.readouterr().err


def test_a_terminals_end_is_heard_unless_it_was_ignored_and_a_second_sigterm_changes_nothing(monkeypatch, capsys):
    timers = []
    monkeypatch.setattr("threading.Timer", lambda *given: timers.append(given) or SimpleNamespace(start=lambda: None))
    before = signal.getsignal(signal.SIGHUP)
    try:
        for own, is_heard in ((signal.SIG_IGN, False), (signal.SIG_DFL, True)):
            signal.signal(signal.SIGHUP, own)
            listener = stopper()
            listener.on_train_begin(None, None, None)
            assert (signal.getsignal(signal.SIGHUP) == listener._hear) is is_heard
            listener.rest()
            assert signal.getsignal(signal.SIGHUP) == own
    finally:
        signal.signal(signal.SIGHUP, before)
    listener._hear(signal.SIGTERM, None)
    listener._hear(signal.SIGTERM, None)
    listener._hear(signal.SIGHUP, None)
    assert len(timers) == 1 and listener.received == signal.SIGHUP
    assert capsys.readouterr().err.count("saving a checkpoint after this draw, then ending") == 3


def test_nobody_to_tell_is_no_reason_to_fail(monkeypatch):
    class Gone:
        def write(self, text):
            raise OSError(5, "Input/output error")

        def flush(self):
            pass

    monkeypatch.setattr("sys.stderr", Gone())
    say("it goes on")


def test_a_signal_that_comes_within_a_write_that_waits_for_its_reader_is_heard(monkeypatch):
    reader, writer = os.pipe()
    listener, text = stopper(), "x" * 200_000  # more than a pipe holds

    def read_late() -> None:
        time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        time.sleep(0.1)
        for _ in iter(lambda: os.read(reader, 65536), b""):
            pass

    with os.fdopen(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", stream)
        listener.on_train_begin(None, None, None)
        thread = threading.Thread(target=read_late)
        thread.start()
        say(text)
        listener.rest()
    thread.join()
    os.close(reader)
    listener._timer.cancel()
    assert listener.received == signal.SIGTERM
