"""`polyphony launch slurm`: one job for trainer and rollout nodes, from the templates `slurm.sbatch` and `slurm.ray`."""

from __future__ import annotations

import os
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


FOUND = '"${SLURM_GPUS_ON_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}"'
"""How many GPUs a node has, said by itself when the job runs there."""


def script(recipe: Recipe, recipe_words: Sequence[str], out: Path, *, gpus_per_node: int | None) -> str:
    """Return the sbatch script of a recipe; None: each node says itself how many GPUs it has.

    `recipe_words` are the recipe and its overrides, as on the command line. Raises RecipeError for a template of the user's
    that cannot be filled in.
    """
    cluster, slurm, folder = recipe.cluster, recipe.cluster.slurm, RunFolder(out)
    options = [f"--partition={slurm.partition}"] if slurm.partition else []
    options += [f"--account={slurm.account}"] if slurm.account else []
    options += ["--exclusive"] if slurm.exclusive else []
    activated, python = _environment()
    return _filled_in(
        slurm.template,
        python=python,
        trainer_nodes=cluster.trainer_nodes,
        name=shlex.quote(f"polyphony-{recipe.name}"),
        nodes=cluster.trainer_nodes + cluster.rollout_nodes,
        rollout_nodes=cluster.rollout_nodes,
        time=slurm.time,
        signal_s=slurm.signal_s,
        logs=shlex.quote(str(folder.logs)),
        options="".join(f"#SBATCH {option}\n" for option in [*options, *slurm.options]),
        cwd=shlex.quote(str(Path.cwd())),
        setup="\n".join([*activated, *map(_checked, range(len(slurm.setup)), slurm.setup)]),
        ray=_ray(recipe, gpus_per_node=gpus_per_node),
        out=shlex.quote(str(out)),
        saved=shlex.quote(str(folder.recipe)),
        end=shlex.quote(str(folder.end)),
        recipe=shlex.join(recipe_words),
    )


def _filled_in(own: str | None, **values: object) -> str:
    """Fill in a template of the user's, or ours. Raises RecipeError that names what is wrong with theirs."""
    path = HERE / "slurm.sbatch" if own is None else Path(own)
    try:
        return Template(path.read_text()).substitute(values)
    except OSError as error:
        raise RecipeError(f"cluster.slurm.template {path}: {error.strerror}") from error
    except KeyError as error:
        known = ", ".join(f"${name}" for name in values)
        raise RecipeError(
            f"cluster.slurm.template {path}: ${error.args[0]} is no placeholder; there are {known}; "
            "a dollar of the shell is written $$"
        ) from error
    except ValueError as error:
        raise RecipeError(f"cluster.slurm.template {path}: {error}; a dollar of the shell is written $$") from error


def _environment() -> tuple[list[str], str]:
    """Return the lines that activate this interpreter's environment on a node, and how Python is then called."""
    prefix = Path(sys.prefix)
    if (activate := prefix / "bin" / "activate").is_file():
        return [_ran(f". {shlex.quote(str(activate))}", f"the environment {prefix} cannot be activated")], "python"
    if (prefix / "conda-meta").is_dir() and (conda := os.environ.get("CONDA_EXE")):
        hook = f'eval "$({shlex.quote(conda)} shell.bash hook)" && conda activate {shlex.quote(str(prefix))}'
        return [_ran(hook, f"the environment {prefix} cannot be activated")], "python"
    return [], shlex.quote(sys.executable)


def _checked(place: int, line: str) -> str:
    return _ran(line, f"cluster.slurm.setup[{place}] failed: {line}")


def _ran(lines: str, otherwise: str) -> str:
    """Return shell that runs lines of others as they are used to be run, and ends the job where the last fails."""
    return f'set +u\n{lines}\nfailed=$?; set +e -u; [ "$failed" -eq 0 ] || stop {shlex.quote(otherwise)}'


def _ray(recipe: Recipe, *, gpus_per_node: int | None) -> str:
    cluster = recipe.cluster
    if recipe.rollouts.engine != "ray":
        return ""
    return Template((HERE / "slurm.ray").read_text()).substitute(
        trainer_nodes=cluster.trainer_nodes,
        ray_port=cluster.ray_port,
        gpus=FOUND if gpus_per_node is None else gpus_per_node,
        taken='"$gpus"' if cluster.rollout_nodes else cluster.processes,
        head_resources="--num-cpus=0 --num-gpus=0" if cluster.rollout_nodes else "",
    )


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
