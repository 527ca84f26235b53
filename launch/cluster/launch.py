"""`polyphony launch local | slurm | ray`: the same recipe on this machine's GPUs, as a Slurm job, or as a Ray job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from polyphony.launch.cluster import local as here
from polyphony.launch.cluster import ray_job as jobs
from polyphony.launch.cluster import slurm as queue
from polyphony.launch.recipe import Recipe, RecipeError
from polyphony.trainer.run import say
from polyphony.trainer.run.folder import RunFolder


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is to be trained, and into which folder."""

    recipe: Recipe
    words: list[str]
    """Recipe and overrides as on the command line, or `--resume RUN`."""
    out: Path
    is_dry: bool
    resumes: bool

    @property
    def train_words(self) -> list[str]:
        """The arguments of `polyphony train`, with paths that hold from any folder."""
        if self.resumes:
            return self.words
        recipe, *overrides = self.words
        return [str(Path(recipe).resolve()), *overrides, "--out", str(self.out)]


def local(run: Job, machine: here.Machine) -> int:
    """Train on this machine, or as one of several that were each started so."""
    here.check_heads(run.recipe, is_dry=run.is_dry)
    command = here.plan(run.recipe, run.train_words, machine, gpus=here.gpus_here())
    if run.is_dry:
        print(command)
        return 0
    if run.recipe.cluster.processes > 1 and machine.rank == 0:
        here.check_port(run.recipe.cluster.port, key="cluster.port")
    if run.recipe.cluster.strategy.startswith("zero"):
        here.leave_no_killed_build(say)
    return here.run(command, run_folder=run.out)


def slurm(run: Job, *, gpus_per_node: int | None) -> int:
    """Submit one Slurm job; print its number and where it logs."""
    _check_slurm(run)
    recipe, *overrides = run.words
    words = [] if run.resumes else [str(Path(recipe).resolve()), *overrides]
    text = queue.script(run.recipe, words, run.out, gpus_per_node=gpus_per_node)
    if run.is_dry:
        print(text, end="")
        return 0
    number = queue.submit(text, run.out)
    print(f"job {number}; log: {RunFolder(run.out).logs / f'slurm-{number}.log'}")
    return 0


def _check_slurm(run: Job) -> None:
    if run.recipe.rollouts.address is not None:
        raise RecipeError("rollouts.address: a Slurm job brings up its own Ray cluster; leave it away")
    _check_rollout_nodes(run)
    here.check_heads(run.recipe, is_dry=run.is_dry)


def _check_rollout_nodes(run: Job) -> None:
    if run.recipe.cluster.rollout_nodes and run.recipe.rollouts.engine != "ray":
        raise RecipeError(
            f"cluster.rollout_nodes={run.recipe.cluster.rollout_nodes} need rollouts.engine: ray, "
            f"got {run.recipe.rollouts.engine}"
        )


def ray(run: Job, *, address: str, gpus_per_node: int | None) -> int:
    """Run on the cluster whose dashboard is at `address`, and follow the job."""
    _check_rollout_nodes(run)
    gpus = here.gpus_here() if gpus_per_node is None else gpus_per_node
    address = address if "://" in address else f"http://{address}"
    cluster = run.recipe.cluster
    unknown = gpus_per_node is None and not gpus  # as where a login machine has none
    held = None if unknown else cluster.processes if gpus else 0
    command = jobs.plan(address, run.train_words, cluster, gpus=held)
    if run.is_dry:
        print(command)
        return 0
    return jobs.submit(command, address)
