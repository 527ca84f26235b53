"""`polyphony launch`: what would run, and what is refused before anything does."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from polyphony.launch.cli import main
from polyphony.launch.cluster import local
from polyphony.launch.cluster import ray_cluster as cluster
from polyphony.launch.recipe import RecipeError, load_recipe
from polyphony.trainer.run.folder import RunFolder
from tests.conftest import HOUSE, RECIPES
from tests.test_bad_input import fails

DEBUG = str(RECIPES / "debug.yaml")


def debug(*overrides: str):
    return load_recipe(DEBUG, list(overrides))


def test_one_process_needs_no_launcher():
    command = local.plan(debug(), ["r.yaml"], local.Machine(), gpus=1)
    assert command.words == [sys.executable, "-P", "-u", "-m", "polyphony.launch.cli", "train", "r.yaml"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_every_strategy_is_shipped(strategy):
    recipe = debug(f"cluster.strategy={strategy}", "cluster.processes=2")
    words = local.plan(recipe, ["r.yaml"], local.Machine(), gpus=2).words
    files = [Path(word) for word in words if word.endswith((".yaml", ".json")) and word != "r.yaml"]
    assert len(files) == (2 if strategy.startswith("zero") else 1)
    assert all(file.read_text() for file in files)
    # accelerate drops DeepSpeed without a word where it is told to use the CPU, and starts one rank of DDP
    assert "--cpu" not in words


def test_without_gpus_ranks_are_started_by_torchrun_and_fsdp_is_refused():
    words = local.plan(debug("cluster.processes=2"), ["r.yaml"], local.Machine(), gpus=0).words
    assert words[1:6] == ["-P", "-m", "torch.distributed.run", "--no-python", "--nproc_per_node"]
    with pytest.raises(RecipeError, match=r"cluster.strategy=fsdp needs GPUs"):
        local.plan(debug("cluster.strategy=fsdp"), [], local.Machine(), gpus=0)


def test_rollout_workers_get_the_gpus_that_the_trainer_leaves():
    recipe = debug("cluster.processes=2", "rollouts={engine: ray, workers: 3, tensor_parallel: 2}")
    assert local.plan(recipe, [], local.Machine(), gpus=8).environment == {local.RAY_GPUS: "2,3,4,5,6,7"}


def test_gpus_keep_the_names_that_they_have_where_the_launcher_is_told_of_some(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-8a")
    recipe = debug("rollouts={engine: ray, workers: 2}")
    assert local.plan(recipe, [], local.Machine(), gpus=3).environment == {local.RAY_GPUS: "5,GPU-8a"}


def test_a_cluster_started_by_a_rank_alone_leaves_its_gpu_out(monkeypatch):
    monkeypatch.setattr("polyphony.launch.cluster.ray_cluster.gpus_here", lambda: 4)
    for name in (local.RAY_GPUS, "CUDA_VISIBLE_DEVICES", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with cluster._spare_gpus_only():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1,2,3"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with cluster._spare_gpus_only():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"


def test_ray_is_told_of_the_trainers_gpus(capsys):
    assert main(["launch", "ray", DEBUG, "cluster.processes=2", "--gpus-per-node", "8", "--dry-run"]) == 0
    assert "--entrypoint-num-gpus 2 -- python -P -m polyphony.launch.cli launch local" in capsys.readouterr().out
    assert main(["launch", "ray", DEBUG, "cluster.processes=2", "--dry-run"]) == 0
    assert "gpus" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.processes=5"], "cluster.processes=5: this machine has 4 GPUs"),
        (
            ["cluster.processes=2", "rollouts={engine: ray, workers: 3}"],
            "rollouts.workers=3 x tensor_parallel=1 need 3 GPUs beside cluster.processes=2; this machine has 4",
        ),
    ],
)
def test_more_workers_than_gpus_are_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        local.plan(debug(*overrides), [], local.Machine(), gpus=4)


def test_a_port_in_use_is_named(capsys):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = fails(capsys, "launch", "local", DEBUG, "cluster.processes=2", f"cluster.port={port}")
    assert f"cluster.port={port}: the port is in use" in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollouts.workers=2"], "workers belong to engine: ray, this recipe has engine: vllm"),
        (["rollouts={engine: ray, workers: 0}"], "rollouts.workers: Input should be greater than or equal to 1, got 0"),
        (["cluster.strategy=zero4"], "cluster.strategy: Input should be 'ddp', 'fsdp', 'zero1', 'zero2' or 'zero3'"),
        (["rollouts={engine: ray, tensor_parallel: 3}"], "tensor_parallel=3 does not divide the model's 4 heads"),
        (["cluster.rollout_nodes=1"], "cluster.rollout_nodes=1 need rollouts.engine: ray, got vllm"),
        (["cluster.slurm.signal_s=1"], "cluster.slurm.signal_s: Input should be greater than or equal to 10, got 1"),
        (["cluster.slurm.partitn=x"], "unknown key 'cluster.slurm.partitn'; did you mean 'partition'?"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_cluster_that_cannot_be_is_named(capsys, overrides, message):
    assert message in fails(capsys, "launch", "slurm", DEBUG, *overrides, "--dry-run")


@pytest.mark.parametrize("where", ["local", "slurm", "ray"])
def test_a_dry_run_needs_no_hub(capsys, tmp_path, where):
    """HF_HUB_OFFLINE=1 in all tests: what asks a hub there fails, as the run itself would."""
    asked = [
        DEBUG,
        "model=nobody/nothing",
        "rollouts={engine: ray, tensor_parallel: 2}",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(["launch", where, *asked, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "nobody/nothing" in said.out
    unchecked = "tensor_parallel=2: whether it divides the heads of nobody/nothing could not be checked, "
    assert said.err.count("\n") == (where != "ray") and (unchecked in said.err) is (where != "ray")
    if where == "slurm":
        assert "model 'nobody/nothing' cannot be loaded" in fails(capsys, "launch", where, *asked)


def test_a_slurm_script_is_valid_shell_and_says_what_it_asks_for(capsys, tmp_path):
    out = str(tmp_path / "a run")  # a space in the path has to survive
    overrides = ["rollouts={engine: ray, workers: 4}", "cluster.rollout_nodes=2", "cluster.slurm.partition=gpu"]
    arguments = [DEBUG, *overrides, "cluster.slurm.options=['--gres=gpu:4']", "--out", out, "--dry-run"]
    assert main(["launch", "slurm", *arguments]) == 0
    text = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    asked = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"--nodes=3", "--partition=gpu", "--gres=gpu:4", "--requeue", "--signal=B:USR1@120"} <= set(asked)
    assert f"--resume {shlex.quote(out)}" in text


CONTAINERS = {
    "shared": ["cluster.slurm.exclusive=false", "cluster.slurm.options=['--gres=gpu:2', '--cpus-per-gpu=8']"],
    "modules": ["cluster.slurm.setup=['module purge', 'module load cuda/13.0 gcc']"],
    "apptainer": [
        "cluster.slurm.setup=['python=(apptainer exec --nv --bind /data --bind \"$PWD\" polyphony.sif python)']"
    ],
    "pyxis": [
        "cluster.slurm.setup=['srun() { command srun --container-image=polyphony.sqsh "
        '--container-mounts="$PWD,/data" --container-workdir="$PWD" "$@"; }\']'
    ],
    "template": [],
}
"""As launch/README.md writes them out."""


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("engine", ["vllm", "ray"])
def test_shellcheck_passes_every_script_that_is_written_out(capsys, tmp_path, kind, engine):
    overrides = [f"rollouts.engine={engine}", "cluster.trainer_nodes=2", *CONTAINERS[kind]]
    if kind == "template":
        own = tmp_path / "own.sbatch"
        own.write_text((HOUSE / "launch" / "README.md").read_text().split("```bash\n")[1].split("```")[0])
        overrides.append(f"cluster.slurm.template={own}")
    assert main(["launch", "slurm", DEBUG, *overrides, "--out", str(tmp_path / "a run"), "--dry-run"]) == 0
    script = tmp_path / "job"
    script.write_text(capsys.readouterr().out)
    checked = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", "--severity=warning", script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout


def test_the_readme_writes_out_what_shellcheck_passes():
    text = (HOUSE / "launch" / "README.md").read_text()
    for kind in ("apptainer", "pyxis"):
        line = CONTAINERS[kind][0].removeprefix("cluster.slurm.setup=")
        assert f"setup: {line}" in text, kind


def test_nodes_say_themselves_how_many_gpus_they_have(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "gpus_here", lambda: 0)  # a login node
    overrides = ["rollouts={engine: ray, workers: 2}", "cluster.processes=2"]
    assert main(["launch", "slurm", DEBUG, *overrides, "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    lines = text[text.index("gpus=") : text.index("on_head() {")]

    def spare(**environment: str) -> str:
        here = 'nvidia-smi() { printf "GPU\\nGPU\\nGPU\\nGPU\\n"; }'
        words = ["bash", "-uc", f'{here}\n{lines}\necho "$spare"']
        given = {"PATH": os.environ["PATH"]} | environment
        return subprocess.run(words, env=given, capture_output=True, text=True, check=True).stdout

    assert spare() == "2,3\n"
    assert spare(SLURM_GPUS_ON_NODE="3") == "2\n"
    assert spare(SLURM_GPUS_ON_NODE="4", CUDA_VISIBLE_DEVICES="4,5,6,GPU-8a") == "6,GPU-8a\n"
    assert spare(SLURM_GPUS_ON_NODE="2") == spare(SLURM_GPUS_ON_NODE="0") == "\n"


@pytest.mark.parametrize("said", ["Traceback: no route", "Ray runtime started."])
def test_a_rollout_node_whose_ray_never_starts_ends_the_job_and_one_that_is_lost_later_does_not(capsys, tmp_path, said):
    overrides = ["rollouts={engine: ray, workers: 2}", "cluster.trainer_nodes=1", "cluster.rollout_nodes=1"]
    assert main(["launch", "slurm", DEBUG, *overrides, "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    lines = text[text.index("trap 'stop \"a rollout") : text.index("if [ -f ")]
    stop = next(line for line in text.splitlines() if line.startswith("stop()"))
    fakes = f"{stop}; python=(ray); nodes=(a b); RAY_ADDRESS=a:1; on() {{ echo on $3: '{said}' >&2; return 3; }}"
    script = f"{fakes}\n{lines}\nsleep 3 >/dev/null 2>&1 & wait $!; echo trained"
    ends = subprocess.run(["bash", "-uc", script], capture_output=True, text=True, timeout=30, check=False)
    told = [f"on --nodelist=b: {said}", "polyphony: Ray on b ended, exit status 3"]
    if "started" in said:
        assert ends.stdout.splitlines() == [*told, "trained"] and ends.returncode == 0
    else:
        assert ends.stdout.splitlines() == told and ends.returncode == 1
        assert ends.stderr == "polyphony: a rollout node has no Ray\n"


def test_another_jobs_ray_at_the_same_port_is_not_taken_for_ones_own(capsys, tmp_path):
    overrides = ["rollouts={engine: ray, workers: 2}", "cluster.rollout_nodes=1"]
    assert main(["launch", "slurm", DEBUG, *overrides, "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    lines = text[text.index("on_head() {") : text.index("trap 'stop \"a rollout")]
    stop = next(line for line in text.splitlines() if line.startswith("stop()"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        lines = lines.replace(f":{6379}", f":{port}").replace("/6379", f"/{port}")
        refused = 'on() { case "$*" in *health-check*) return 1;; *) sleep 2; return 5;; esac; }'
        fakes = f"{stop}; python=(ray); head=127.0.0.1; spare=; RAY_ADDRESS=127.0.0.1:{port}; {refused}"
        ends = subprocess.run(
            ["bash", "-uc", f"{fakes}\n{lines}"], capture_output=True, text=True, timeout=60, check=False
        )
    assert ends.stderr == "polyphony: Ray did not start on 127.0.0.1, exit status 5\n" and ends.returncode == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "#SBATCH --nodes=$nodes\n$seup\n",
            r"$seup is no placeholder; there are $python, $trainer_nodes, $name, $nodes",
        ),
        ("echo $(date)\n", "Invalid placeholder in string: line 1, col 6; a dollar of the shell is written $$"),
        (None, "No such file or directory"),
    ],
)
def test_a_template_of_ones_own_is_filled_in_or_its_fault_named(capsys, tmp_path, text, message):
    own = tmp_path / "own.sbatch"
    if text is not None:
        own.write_text(text)
    said = fails(capsys, "launch", "slurm", DEBUG, f"cluster.slurm.template={own}", "--dry-run")
    assert f"cluster.slurm.template {own}: {message}" in said
    own.write_text("#SBATCH --nodes=$nodes\necho $$HOME\n$setup\n$recipe\n")
    assert main(["launch", "slurm", DEBUG, f"cluster.slurm.template={own}", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("#SBATCH --nodes=1\necho $HOME\n")


def test_a_run_that_was_looked_at_is_queued_again_and_one_that_has_ended_is_not(capsys, tmp_path):
    assert main(["launch", "slurm", DEBUG, "--out", str(tmp_path), "--dry-run"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "scontrol requeue" in line]

    def queued() -> bool:
        told = f"SLURM_JOB_ID=7; told=1; scontrol() {{ echo $1 $2; }}; {line}"
        done = subprocess.run(["bash", "-uc", told], capture_output=True, text=True, check=False)
        return "requeue 7" in done.stdout

    folder = RunFolder(tmp_path)
    folder.report.write_text("what `polyphony report` writes of a run that is under way")
    assert queued()
    folder.record_end("finished", why="all steps were taken", step=6)
    assert not queued()


def test_a_job_for_a_cluster_that_is_not_up_ends_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr("polyphony.launch.cluster.ray_job.ANSWER_S", 0.2)
    assert "did not answer within 0.2 s" in fails(capsys, "launch", "ray", DEBUG, "--address", "127.0.0.1:9")
