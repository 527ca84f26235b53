"""W&B, real but without its servers: offline files, servers that are gone or mute, and a small one that answers."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from polyphony.curricula.monitors import Alarm
from polyphony.curricula.records import Completion, Prompt
from polyphony.curricula.transfer.matrix import TransferMatrix
from polyphony.launch.cli import main
from polyphony.launch.report.run import read_run
from polyphony.trainer.evaluation.result import HeldoutResult
from polyphony.trainer.metrics import METRICS
from polyphony.trainer.run.callbacks import Run
from polyphony.trainer.run.folder import RunFolder
from polyphony.trainer.run.json_lines import write_object
from polyphony.trainer.run.outset import Cadence, Outset
from polyphony.trainer.run.tracking import (
    WandbTracker,
    is_reachable,
    known_as,
    track_completions,
    track_decisions,
    track_transfer,
)
from polyphony.trainer.run.wandb_dashboard import CURVES, SECTIONS, TABLES, build_workspace, specification
from polyphony.trainer.settings import TrainerSettings, WandbSettings
from polyphony.trainer.slots import DrawPlan
from tests.benchmarks.synthetic_run import write_run
from tests.conftest import POLICY

KEY = "0" * 40


@pytest.fixture
def mute():
    """A server that takes connections and never says a word."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(20)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture(autouse=True)
def forgetful():
    """W&B reads its environment once a process."""
    wandb.teardown()
    yield
    wandb.teardown()


def tracker(folder, mode) -> WandbTracker:
    folder.mkdir(exist_ok=True)
    ours = WandbTracker(WandbSettings(mode=mode), name="test", folder=folder, config={"a": 1})
    assert not (folder / "wandb").exists() or (folder / "wandb.json").exists()  # before it begins, nothing is written
    ours.begin()
    return ours


def offline_runs(folder) -> list:
    """Return the files of the runs that have ended: W&B's service closes them after `finish` has returned."""
    wandb.teardown()  # waits for the service's end
    return list((folder / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.slow
def test_an_offline_run_holds_numbers_tables_and_the_heatmap(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "polyphony.trainer.run.tracking.FINISH_S", 120.0
    )  # on a busy machine importing W&B alone may take long
    run = write_run(tmp_path / "run", steps=20, eval_every=10, items=10)
    ours = tracker(tmp_path, "offline")
    ours.log(1, {"domain/math/reward": 0.25})
    track_decisions(ours, 2, [json.loads(line) for line in (run / "decisions.jsonl").read_text().splitlines()])
    track_transfer(ours, 3, TransferMatrix.load(run / "transfer.json"))
    ours.finish()
    (file,) = offline_runs(tmp_path)
    written = file.read_bytes()
    for text in (b"domain/math/reward", b"decisions", b"transfer_heatmap", b"confusion_matrix"):
        assert text in written
    tables = [json.loads(p.read_text()) for p in file.parent.glob("files/media/table/*.table.json")]
    columns = {tuple(table["columns"]): len(table["data"]) for table in tables}
    assert columns[("trained", "measured", "change", "low", "high")] == 4 * 5
    assert columns[("step", "draw", "arithmetic", "strings", "facts", "stories", "stage", "reason")] == 20


def test_every_kind_of_alarm_is_an_alert_a_note_and_a_line(tmp_path):
    entropy = Alarm(step=3, domain="math", kind="collapse", message="entropy fell", drawn={"math": 1.0})
    shortcut = Alarm(step=3, domain="talk", kind="length_collapse", message="correct answers have shrunk")
    told: list[tuple] = []
    notes: list[str] = []
    folder = RunFolder(tmp_path)
    trainer = SimpleNamespace(
        entropy=SimpleNamespace(pending=[entropy], monitor=SimpleNamespace(factors=(0.5, 1.5))),
        shortcuts=SimpleNamespace(pending=[shortcut]),
        curriculum=SimpleNamespace(
            note=notes.append, draws=3, exposure={"math": 8}, begun=None, recoveries=SimpleNamespace(open=None)
        ),
        accelerator=SimpleNamespace(is_main_process=True),
        data=SimpleNamespace(domains=(), names=(), n_train=8, skills={}),
        args=SimpleNamespace(seed=1, max_grad_norm=1.0),
        plan=DrawPlan(prompts_per_draw=8, draws=9, steps=9, micro_batches_per_draw=1, micro_batches_per_step=1),
    )
    cadence, settings = Cadence(evaluate_every=10, save_every=10, keep=1), TrainerSettings.of(max_grader_failures=0.5)
    outset = Outset(folder=folder, cadence=cadence, settings=settings, said=None)
    run = Run(trainer, outset, model="policy")  # type: ignore[arg-type]
    run.tracker = SimpleNamespace(alert=lambda *words: told.append(words))  # type: ignore[assignment]
    run.on_step_end(None, SimpleNamespace(global_step=3, max_steps=9), SimpleNamespace())
    assert [title for title, _ in told] == ["collapse of math", "length_collapse of talk"]
    assert [line["kind"] for line in folder.read("alarms")] == ["collapse", "length_collapse"]
    assert all(line["remedy"] in text for line, (_, text) in zip(folder.read("alarms"), told, strict=True))
    assert [note.split(":")[0] for note in notes] == ["math", "talk"]


@pytest.mark.slow
def test_trackio_gets_what_the_run_folder_gets_panels_of_a_domain_together(tmp_path, monkeypatch, recipe):
    pytest.importorskip("trackio", reason="needs the extra `trackio`")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")  # its variable is read at import
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import order_metrics_by_plot_preference

    overrides = [f"model={POLICY}", "rollouts.engine=transformers", "grpo.max_steps=1", "grpo.report_to=trackio"]
    overrides += ["grpo.project=house", "grpo.run_name=mine"]
    assert main(["train", str(recipe), *overrides, "--out", str(tmp_path / "run")]) == 0
    told = {name for line in RunFolder(tmp_path / "run").read("metrics") for name in line if "/" in name}
    assert {"domain/sums/reward", "heldout/words/score", "curriculum/sums/mixture"} <= told
    stored = SQLiteStorage.get_all_metrics_for_run("house", "mine")
    assert {f"train/{name}" for name in told} <= set(stored)
    # the baseline arrives at step 0, there and at whatever else `report_to` names
    lines = SQLiteStorage.get_logs("house", "mine")
    assert [line["train/global_step"] for line in lines if "train/heldout/words/score" in line] == [0, 1]
    _, shown = order_metrics_by_plot_preference(stored)  # as its pages have them: accordions, their panels in order
    for section in ("domain", "heldout", "shortcuts"):
        owners = [name.split("/")[2] for name in shown["train"]["subgroups"][section] if name.count("/") == 3]
        assert [owner for owner, _ in itertools.groupby(owners)] == ["sums", "words"]


@pytest.mark.slow
@pytest.mark.parametrize("outage", ["refused", "mute"])
def test_a_server_that_cannot_be_reached_neither_slows_nor_stops_a_run(tmp_path, monkeypatch, mute, outage):
    monkeypatch.setenv("WANDB_BASE_URL", mute if outage == "mute" else "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr("polyphony.trainer.run.tracking.FINISH_S", 120.0)
    ours = tracker(tmp_path, "online")
    for step in range(50):
        ours.log(step, {"reward": 0.5})
    assert ours._tasks.qsize() == 50  # the run is past them all before W&B has taken the first
    ours.finish()
    assert b"reward" in offline_runs(tmp_path)[0].read_bytes()  # nothing is lost: it can be synced later


@pytest.mark.slow
def test_the_end_of_a_run_waits_a_bounded_time(tmp_path, monkeypatch, mute, caplog):
    monkeypatch.setenv("WANDB_BASE_URL", mute)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr("polyphony.trainer.run.tracking.FINISH_S", 0.01)
    ours = tracker(tmp_path, "online")
    ours.finish()
    assert ours._thread.is_alive()
    assert "wandb sync" in caplog.text
    ours._thread.join(120)
    assert not ours._thread.is_alive()


def test_a_failing_tracker_is_left_behind(tmp_path, caplog):
    ours = tracker(tmp_path, "disabled")
    ours._tasks.put(lambda run: 1 / 0)
    ours.log(1, {"reward": 0.5})
    ours.finish()
    assert "W&B failed (ZeroDivisionError: division by zero); metrics are in metrics.jsonl" in caplog.text


def test_a_mute_server_is_not_reachable_and_an_error_page_is(mute, monkeypatch):
    monkeypatch.setattr("polyphony.trainer.run.tracking.REACH_S", 0.2)
    assert not is_reachable(mute) and not is_reachable("http://127.0.0.1:9")
    with small_server() as (url, _):
        assert is_reachable(url)


# --- the dashboard ------------------------------------------------------------------------------------------------------


def test_every_panel_shows_metrics_that_a_run_logs():
    for rows in SECTIONS.values():
        assert all(metric in METRICS[family] for family, metrics in rows.items() for metric in metrics)
    assert all(m in METRICS[f] for kinds in CURVES.values() for curves in kinds for f, m in curves)
    workspace = build_workspace(name="n", entity="e", project="p", domains=["math", "safety"])
    text = json.dumps(specification(workspace))
    assert "heldout/math/score" in text and "transfer/safety/bwt" in text and "completions" in text


def test_a_dashboard_opens_on_entropy_and_forgetting_and_has_no_empty_panel(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=20, eval_every=10, items=10))
    logged = {*run.metrics, *(f"transfer/safety/drawdown{end}" for end in ("", "_low", "_high"))}
    workspace = build_workspace(name="n", entity="e", project="p", domains=run.domains, logged=logged)
    *curves, _ = workspace.sections
    assert [section.name for section in curves][:3] == list(CURVES) and all(s.is_open for s in curves[:3])
    named = [{getattr(y, "name", y) for y in panel.y} for section in curves for panel in section.panels]
    assert all(names and names <= logged for names in named)
    assert len(curves[0].panels) == 4 and len(curves[1].panels) == 1  # no held-out entropy was logged
    assert {"transfer/safety/drawdown", "transfer/safety/drawdown_low", "transfer/safety/drawdown_high"} in named


def test_without_a_key_the_specification_is_written_and_how_to_push_it_said(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run", steps=20, eval_every=10, items=10)
    held = sorted(run.rglob("*"))
    assert main(["dashboard", str(run)]) == 0
    assert sorted(run.rglob("*")) == held  # nothing is written into a run folder but the report
    out = capsys.readouterr().out
    assert "no API key is set. To push: `wandb login`, `wandb sync" in out
    assert "heldout/arithmetic/score" in (tmp_path / "run-dashboard.json").read_text()
    rows = {line[:42].strip(): line[42:].split(maxsplit=1) for line in out.splitlines()}
    assert rows["Entropy against its band"] == ["4", "domain/<d>/entropy"]
    assert rows["The whole run (folded)"] == ["2", "rollout/useful_token_frac, rollout/tokens_per_s"]
    assert rows["Completions, decisions, transfer (folded)"][0] == "3"
    assert not (tmp_path / "run-dashboard.url").exists()


def test_a_dashboard_of_no_run_is_an_error(tmp_path, capsys):
    assert main(["dashboard", str(tmp_path / "gone")]) == 2
    assert "no such run folder" in capsys.readouterr().err


class small_server:  # noqa: N801 (used like a function)
    """W&B in a few lines: keeps one view, as `saved`, and gives it back; keeps the lines of one run, as `self.lines`."""

    def __enter__(self):
        saved: list[dict] = []
        self.lines: list[tuple[int, Any]] = []
        run = {"id": "r", "name": "", "project": {"name": "p", "entity": {"name": "team"}}, "config": "{}"}
        seen = {"summaryMetrics": "{}", "eventsTail": "[]", "tags": [], "logLineCount": 0, "eventsLineCount": 0}

        def answer(query: str, variables: dict) -> dict:
            if "upsertView" in query:
                saved.append(variables)
                return {"upsertView": {"view": {"id": "view-1", "name": variables["name"]}, "inserted": True}}
            if "allViews" in query:
                node = {"id": "view-1", "displayName": "old", "spec": saved[-1]["spec"]}
                return {"project": {"allViews": {"edges": [{"node": node}]}}}
            if "UpsertBucket" in query:
                return {"upsertBucket": {"bucket": run | {"name": variables["name"]}, "inserted": True}}
            if "RunResumeStatus" in query:
                tail = json.dumps([json.dumps({"_step": step}) for step, _ in self.lines[-1:]])
                past = seen | {"historyLineCount": len(self.lines), "historyTail": tail, "wandbConfig": '{"t": 1}'}
                return {"model": {"bucket": run | past}}
            if "CreateRunFiles" in query:
                return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}}
            viewer = {"id": "u", "entity": "team", "username": "u", "flags": "{}", "teams": {"edges": []}}
            return {"viewer": viewer, "serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None}}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_error(404)

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                asked = json.loads(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
                history = asked.get("files", {}).get("wandb-history.jsonl", {"content": []})
                lines.extend((line["_step"], line.get("reward")) for line in map(json.loads, history["content"]))
                found = {"data": answer(asked["query"], asked.get("variables") or {})} if "query" in asked else {}
                body = json.dumps(found).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        lines = self.lines
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}", saved

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.slow
def test_a_dashboard_is_created_once_and_updated_from_then_on(tmp_path, capsys, monkeypatch):
    run, out = write_run(tmp_path / "run", steps=20, eval_every=10, items=10), tmp_path / "boards" / "run.json"
    with small_server() as (url, saved):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        again = ["dashboard", str(run), "--out", str(out)]
        assert main(again) == 0 and main(again) == 0
    assert len(saved) == 2 and "id" not in saved[0] and saved[1]["id"] == "view-1"
    assert "heldout/arithmetic/score" in saved[1]["spec"]
    assert out.with_suffix(".url").read_text() in capsys.readouterr().out


def test_where_wandb_cannot_start_the_run_goes_on_and_is_told_where_its_numbers_are(tmp_path, monkeypatch, caplog):
    asked = []

    def refuse(**given):
        asked.append(given["mode"])
        raise wandb.Error("no W&B today")

    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setattr("polyphony.trainer.run.tracking.is_reachable", lambda url: True)
    online = tracker(tmp_path, "online")
    online.log(1, {"reward": 0.5})
    online.finish()
    assert asked == ["online", "offline"]
    assert "W&B cannot start offline (no W&B today); metrics are in metrics.jsonl" in caplog.text


class Heard:
    """What a tracker is given, by table."""

    def __init__(self):
        self.tables, self.maps = {}, {}

    def log_table(self, step, name, columns, rows):
        self.tables[name] = (step, columns, rows)

    def log_heatmap(self, step, name, title, cells):
        self.maps[name] = cells


def test_completions_and_decisions_are_tables_a_row_each():
    heard: Any = Heard()
    chat = [{"role": "user", "content": "2+2="}, {"role": "user", "content": None}]
    said = Completion(ids=(), prompt=Prompt(domain="math", id="a", prompt=chat), text="4", reward=1.0)
    track_completions(heard, 3, HeldoutResult(items={}, samples={}, entropy={}, shown=(said,)))
    assert heard.tables["completions"][2] == [[3, "math", "2+2=\n", "4", 1.0, False]]
    track_decisions(heard, 3, [])
    assert "decisions" not in heard.tables
    line = {"step": 1, "draw": 0, "mixture": {"math": 1.0}, "stage": None, "reason": "only one"}
    track_decisions(heard, 3, [line] * 5000)
    assert heard.tables["decisions"][2][0] == [1, 0, 1.0, "", "only one"]
    assert len(heard.tables["decisions"][2]) == 1667  # every third
    assert {*heard.tables, "transfer"} == set(TABLES)


def test_a_resumed_run_is_the_same_run_for_wandb_with_its_group_and_tags(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_GROUP", "ablation")
    monkeypatch.setenv("WANDB_TAGS", "first,second")
    folder = RunFolder(tmp_path)
    first = known_as(folder)
    assert (len(first["id"]), first["group"], first["tags"]) == (8, "ablation", ["first", "second"])
    assert "resume" not in first and not folder.tracked.exists()
    write_object(folder.tracked, first)
    monkeypatch.delenv("WANDB_RUN_GROUP")
    monkeypatch.setenv("WANDB_TAGS", "third")
    assert known_as(folder) == first | {"tags": ["third"], "resume": "allow"}


@pytest.mark.slow
def test_the_parts_of_a_resumed_offline_run_are_synced_as_one_in_which_no_step_is_told_twice(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("polyphony.trainer.run.tracking.FINISH_S", 120.0)
    for first, kept, last in ((0, 2, 4), (3, 6, 6)):  # the first part had taken two steps after its checkpoint
        ours = tracker(tmp_path, "offline")
        for step in range(first, last + 1):
            ours.log(step, {"reward": step / 10})
            if step == kept:
                ours.saved()
        if first:
            ours.finish()
            assert "one more part of an offline run; all as one: wandb sync" in caplog.text
        while ours._tasks.qsize():  # the first is then left, as by a kill
            time.sleep(0.01)
        assert len(offline_runs(tmp_path)) == 1 + (first > 0)
    server = small_server()
    with server as (url, _):
        known = {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}
        words = [sys.executable, "-m", "wandb", "sync", str(tmp_path / "wandb")]
        subprocess.run(words, env=os.environ | known, cwd=tmp_path, check=True, timeout=300, capture_output=True)
    assert server.lines == [(step, step / 10) for step in range(7)]
