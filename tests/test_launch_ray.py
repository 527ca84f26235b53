"""`polyphony launch ray` on a cluster of several raylets, and what is said of one that cannot be used."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

import psutil
import pytest
import ray

from polyphony.launch.cli import main
from polyphony.launch.cluster import ray_cluster as cluster
from polyphony.launch.cluster import ray_job as jobs
from polyphony.launch.cluster import ray_nodes
from polyphony.launch.recipe import RecipeError
from tests.conftest import RECIPES, bare_interpreter
from tests.forks import free_port
from tests.test_bad_input import fails

DEBUG = str(RECIPES / "debug.yaml")
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@contextmanager
def silent_port():
    """Something that listens and says nothing."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


@contextmanager
def dashboard_of(status: int, version: str):
    """A server that answers as Ray's dashboard does."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps({"ray_version": version}).encode())

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_silent_cluster_is_named_within_its_time():
    started = time.monotonic()
    with silent_port() as port, pytest.raises(RecipeError, match=r"did not answer as Ray's head within 3 s"):
        cluster.check_cluster(f"127.0.0.1:{port}", timeout_s=3)
    assert time.monotonic() - started < 30


def test_a_silent_dashboard_is_named_within_its_time():
    with silent_port() as port, pytest.raises(RecipeError, match=r"does not answer as one \(TimeoutError\)"):
        jobs.check_dashboard(f"http://127.0.0.1:{port}", timeout_s=0.5)


def test_a_dashboard_of_another_ray_is_named():
    expected = f"the cluster has Ray 2.9.0, here it is {ray.__version__}; install the same Ray"
    with dashboard_of(200, "2.9.0") as address, pytest.raises(RecipeError, match=expected):
        jobs.check_dashboard(address, timeout_s=10)


def test_a_dashboard_that_asks_for_a_token_says_where_to_put_it():
    with dashboard_of(401, "") as address, pytest.raises(RecipeError, match="set RAY_AUTH_MODE=token"):
        jobs.check_dashboard(address, timeout_s=10)


@pytest.fixture(scope="module")
def raylets(tmp_path_factory):
    """A head without cores and three more raylets of one core each: environment, address and dashboard."""
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 2}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    # their interpreter lacks polyphony: jobs and workers run from the tree that is sent to them. A job's `python` is the
    # one its node was started with, as in a virtual environment that was activated
    python = bare_interpreter(tmp_path_factory.mktemp("raylets") / "venv")
    environment["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    nodes: list[subprocess.Popen] = []
    # a short folder: the sockets below it have paths of at most 103 bytes, and pytest's own folders are long
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        try:
            address, dashboard = bring_up(nodes, environment, Path(folder))
            yield environment, address, dashboard
        finally:
            take_down(nodes)


def bring_up(nodes: list[subprocess.Popen], environment, folder: Path, tries: int = 3) -> tuple[str, str]:
    """Start the cluster's `nodes` one after the other: a small machine is late, and Ray's own 30 s are fixed."""
    said = folder / "said.txt"
    for left in reversed(range(tries)):
        port, dashboard_port = free_port(), free_port()
        address, dashboard = f"127.0.0.1:{port}", f"127.0.0.1:{dashboard_port}"
        head = [
            "--head",
            f"--port={port}",
            "--num-cpus=0",
            f"--dashboard-port={dashboard_port}",
            f"--temp-dir={folder}",
        ]
        member = [f"--address={address}", "--num-cpus=1"]
        try:
            for words in (head, member, member, member):
                nodes.append(start_node(words, environment, said))
                wait_for_nodes(environment, dashboard, nodes)
            wait_for_agents(folder, nodes)
            return address, dashboard
        except RuntimeError as error:
            take_down(nodes)
            if not left:
                pytest.fail(f"{error}; the nodes said:\n{said.read_text()}")
    raise AssertionError("the loop returns or fails")


def take_down(nodes: list[subprocess.Popen]) -> None:
    while nodes:
        node = nodes.pop()
        family = psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []
        node.terminate()
        node.wait(timeout=60)
        psutil.wait_procs(family, timeout=30)
        for left in family:
            if left.is_running():
                left.kill()


def start_node(words: list[str], environment, said: Path) -> subprocess.Popen:
    python = shutil.which("python", path=environment["PATH"])
    words = [python, *RAY[1:], "start", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", *words]
    words += ["--dashboard-agent-listen-port=0"]  # one that is free when the agent, which takes jobs, binds it
    with said.open("a") as file:
        return subprocess.Popen(words, env=environment, stdout=file, stderr=file)


def wait_for_nodes(environment, dashboard: str, nodes: list[subprocess.Popen], timeout_s: float = 180) -> None:
    """Wait until the cluster knows as many nodes as were started; RuntimeError if one has ended or the time is up."""
    token = {"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
    request = urllib.request.Request(f"http://{dashboard}/nodes?view=summary", headers=token)
    deadline = time.monotonic() + timeout_s
    while True:
        shown: list[str] = []
        with suppress(OSError, HTTPException), urllib.request.urlopen(request, timeout=60) as answer:
            shown = [node["raylet"].get("state") for node in json.load(answer)["data"]["summary"]]
        if shown.count("ALIVE") >= len(nodes):
            return
        codes = [node.poll() for node in nodes]
        if codes != [None] * len(nodes):
            raise RuntimeError(f"a node has ended, exit codes {codes}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(nodes)} nodes were started, the cluster shows {shown!r}")
        time.sleep(0.5)


def wait_for_agents(folder: Path, nodes: list[subprocess.Popen], timeout_s: float = 120) -> None:
    """Wait until each node's agent has written where it listens: jobs are refused until the head's does."""
    deadline = time.monotonic() + timeout_s
    while True:
        ports = [file.read_text() for file in folder.glob("session_latest/dashboard_agent_listen_port_*")]
        if len([port for port in ports if port.isdigit() and int(port)]) == len(nodes):
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(nodes)} nodes were started, their agents listen on {ports}")
        time.sleep(0.5)


@pytest.mark.slow
def test_a_job_trains_on_two_nodes_with_its_worker_on_a_third(raylets, tmp_path):
    """Each raylet has one core: the trainer's two ranks and the worker cannot be on the same."""
    environment, _, dashboard = raylets
    run = tmp_path / "run"
    overrides = ["rollouts={engine: ray, workers: 1}", "tracking.wandb=null", "grpo.max_steps=2", "eval.every=2"]
    overrides += ["eval.samples=1", "grpo.max_completion_length=8"]
    overrides += ["cluster.trainer_nodes=2", "cluster.rollout_nodes=1", f"cluster.port={free_port()}"]
    command = [sys.executable, "-m", "polyphony.launch.cli", "launch", "ray", DEBUG, *overrides]
    done = subprocess.run(
        [*command, "--address", dashboard, "--out", str(run)],
        env=environment, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert (run / "final" / "model.safetensors").exists()
    assert said.count("launch local") == 0  # none of them refused its words
    assert "(Node pid=" in said


def test_the_cluster_says_whether_a_trainer_has_gpus_where_this_machine_has_none(capsys, monkeypatch):
    given = ["launch", "ray", DEBUG, "--address", "h:8265", "--dry-run", "cluster.processes=2"]
    monkeypatch.setattr("polyphony.launch.cluster.local.gpus_here", lambda: 0)
    assert main(given) == 0
    said = capsys.readouterr().out
    assert "ray_nodes --trainer-nodes 1 --rollout-nodes 0 --processes 2 --" in said and "num-gpus" not in said
    assert main([*given, "--gpus-per-node", "0"]) == 0
    assert "ray_nodes" not in capsys.readouterr().out
    words = "cluster.rollout_nodes=1 need rollouts.engine: ray, got vllm"
    assert words in fails(capsys, *given, "cluster.rollout_nodes=1")


def test_a_trainers_node_is_held_whole_where_workers_have_their_own(monkeypatch):
    sizes = [({"GPU": 8.0}, True), ({"CPU": 1.0}, True), ({"GPU": 4.0}, True), ({"GPU": 8.0}, False)]
    monkeypatch.setattr(ray, "nodes", lambda: [{"Resources": of, "Alive": alive} for of, alive in sizes])
    assert ray_nodes.gpus_of_nodes() == [8, 4, 0]
    assert ray_nodes.held(2, trainer_nodes=1, rollout_nodes=2) == 8
    assert ray_nodes.held(2, trainer_nodes=2, rollout_nodes=1) == 4
    assert ray_nodes.held(2, trainer_nodes=2, rollout_nodes=0) == 2
    assert ray_nodes.held(0, trainer_nodes=1, rollout_nodes=1) == 0


def test_nodes_that_do_not_come_are_counted(monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}, {"Alive": False}])
    assert ray_nodes.check_nodes(1, timeout_s=0) == ""
    said = "cluster.trainer_nodes and rollout_nodes are 3 together, the Ray cluster has 1 nodes"
    assert ray_nodes.check_nodes(3, timeout_s=0) == said


def test_a_job_over_several_nodes_is_driven_by_one_that_holds_no_gpu(capsys, tmp_path):
    overrides = ["rollouts={engine: ray, workers: 2}", "cluster={trainer_nodes: 2, rollout_nodes: 1, processes: 4}"]
    arguments = [DEBUG, *overrides, "--address", "host:8265", "--gpus-per-node", "8", "--out", str(tmp_path / "run")]
    assert main(["launch", "ray", *arguments, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "polyphony.launch.cluster.ray_nodes --trainer-nodes 2 --rollout-nodes 1 --gpus 4 -- " in said
    assert "--entrypoint-num-gpus" not in said


@pytest.mark.slow
def test_a_cluster_with_a_token_is_not_joined_without_it(raylets, monkeypatch, capsys):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RecipeError, match="it asks for its token: set RAY_AUTH_MODE=token"):
        cluster.check_cluster(raylets[1], timeout_s=60)
    assert "it asks for its token" in fails(capsys, "launch", "ray", DEBUG, "--address", raylets[2])


def test_a_dry_run_prints_the_submission_and_submits_nothing(capsys, tmp_path):
    assert main(["launch", "ray", DEBUG, "--address", "host:8265", "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "job submit --address http://host:8265" in said
    assert f"--processes 1 -- {DEBUG} --out {tmp_path / 'run'}" in said
