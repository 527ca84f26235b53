"""`polyphony launch slurm`: one job for trainer and rollout nodes, from the templates `slurm.sbatch` and `slurm.ray`."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template

from polyphony.curricula.files import replace_file
from polyphony.launch.recipe import Recipe, RecipeError
from polyphony.trainer.run.folder import RunFolder

HERE = Path(__file__).resolve().parent


def script(recipe: Recipe, recipe_words: Sequence[str], out: Path, *, gpus_per_node: int) -> str:
    """Return the sbatch script of a recipe. `recipe_words` are the recipe and its overrides, as on the command line."""
    cluster, slurm, folder = recipe.cluster, recipe.cluster.slurm, RunFolder(out)
    options = [f"--partition={slurm.partition}"] if slurm.partition else []
    options += [f"--account={slurm.account}"] if slurm.account else []
    common = {
        "python": shlex.quote(sys.executable),
        "trainer_nodes": cluster.trainer_nodes,
        "ray_port": cluster.ray_port,
    }
    return Template((HERE / "slurm.sbatch").read_text()).substitute(
        common,
        name=shlex.quote(f"polyphony-{recipe.name}"),
        nodes=cluster.trainer_nodes + cluster.rollout_nodes,
        rollout_nodes=cluster.rollout_nodes,
        time=slurm.time,
        signal_s=slurm.signal_s,
        logs=shlex.quote(str(folder.logs)),
        options="".join(f"#SBATCH {option}\n" for option in [*options, *slurm.options]),
        cwd=shlex.quote(str(Path.cwd())),
        setup="\n".join(slurm.setup),
        ray=_ray(recipe, common, gpus_per_node=gpus_per_node),
        out=shlex.quote(str(out)),
        saved=shlex.quote(str(folder.recipe)),
        end=shlex.quote(str(folder.end)),
        recipe=shlex.join(recipe_words),
    )


def _ray(recipe: Recipe, common: dict, *, gpus_per_node: int) -> str:
    cluster = recipe.cluster
    if recipe.rollouts.engine != "ray":
        return ""
    if cluster.rollout_nodes:
        head_gpus, resources = "CUDA_VISIBLE_DEVICES=", "--num-cpus=0 --num-gpus=0"
    else:
        spare = ",".join(str(i) for i in range(cluster.processes, gpus_per_node))
        head_gpus, resources = f"CUDA_VISIBLE_DEVICES={spare}", ""
    return Template((HERE / "slurm.ray").read_text()).substitute(common, head_gpus=head_gpus, head_resources=resources)


def submit(text: str, out: Path) -> str:
    """Hand the script to sbatch, keep it in the run folder's `logs`; return the job's number. Raises RecipeError."""
    if shutil.which("sbatch") is None:
        raise RecipeError("sbatch is not on PATH: run this on a machine of the Slurm cluster, or use --dry-run")
    logs = RunFolder(out).logs
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / "job.sbatch"
    replace_file(path, text)
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RecipeError(f"sbatch refused {path}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]
