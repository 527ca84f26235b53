"""`polyphony launch local`: the trainer ranks of this machine, under accelerate; signals handed on, failures explained.

And locks that a killed build of DeepSpeed's kernels left behind: torch (`FileBaton`) locks a build by a file that is there,
open in the process that builds. A process killed inside a build leaves the file, and whoever needs the kernel next waits for
it without a word and without an end.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from polyphony.launch.recipe import Recipe, RecipeError
from polyphony.launch.sections import ClusterSection
from polyphony.trainer.run import say

DATA = Path(__file__).resolve().parent.parent
"""Where the configurations of accelerate and DeepSpeed are."""


PYTHON = [sys.executable, "-P"]
"""What starts a child of ours: a file in the working directory must not stand in for a module."""


OURS = [*PYTHON, "-u", "-m", "polyphony.launch.cli"]


REFUSED = 2
"""Exit code of a command whose input cannot be worked with; it has said why in one line."""


RAY_GPUS = "POLYPHONY_ROLLOUT_GPUS"
"""Environment variable: the GPUs of this machine that a Ray cluster started by the trainer may use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """This machine's part in a group of machines."""

    rank: int = 0
    of: int = 1
    main_address: str = "127.0.0.1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """What will run: the words and the environment variables it adds."""

    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.words)])


def gpus_here() -> int:
    """Return the number of GPUs that a process started here would see, without starting CUDA in this one."""
    import torch  # slow to import

    return torch.cuda.device_count()


def names_of_gpus(count: int) -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES calls the GPUs that a process started here would see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


def plan(recipe: Recipe, train_words: Sequence[str], machine: Machine, *, gpus: int) -> Command:
    """Return the command that trains on this machine. Raises RecipeError for more ranks or workers than GPUs."""
    cluster = recipe.cluster
    check_room(recipe, gpus=gpus)
    words = [*OURS, "train", *train_words]
    environment = {} if gpus else {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if recipe.rollouts.engine == "ray" and gpus and recipe.rollouts.address is None:
        environment[RAY_GPUS] = ",".join(names_of_gpus(gpus)[cluster.processes :])
    if not gpus and cluster.strategy == "ddp":
        environment["ACCELERATE_USE_CPU"] = "true"  # else every rank believes to be alone; DeepSpeed would go missing
    if cluster.processes * machine.of == 1 and cluster.strategy == "ddp":
        return Command(words=words, environment=environment)
    return Command(words=[*group_words(cluster, machine, gpus=gpus), *words], environment=environment)


def group_words(cluster: ClusterSection, machine: Machine, *, gpus: int) -> list[str]:
    """Return what starts the ranks: accelerate, or torchrun where there is no GPU, whose `--cpu` starts one rank only."""
    if not gpus and cluster.strategy == "ddp":
        words = [*PYTHON, "-m", "torch.distributed.run", "--no-python", "--nproc_per_node", str(cluster.processes)]
        words += ["--nnodes", str(machine.of), "--node_rank", str(machine.rank)]
        return [*words, "--master_addr", machine.main_address, "--master_port", str(cluster.port)]
    words = [*PYTHON, "-m", "accelerate.commands.launch", "--no_python"]
    words += ["--config_file", str(DATA / "accelerate" / f"{cluster.strategy}.yaml")]
    if cluster.strategy.startswith("zero"):
        words += ["--deepspeed_config_file", str(DATA / "deepspeed" / f"{cluster.strategy}.json")]
        words += ["--deepspeed_multinode_launcher", "standard"]
    words += ["--num_processes", str(cluster.processes * machine.of), "--num_machines", str(machine.of)]
    words += ["--machine_rank", str(machine.rank), "--main_process_ip", machine.main_address]
    return [*words, "--main_process_port", str(cluster.port)]


def check_room(recipe: Recipe, *, gpus: int) -> None:
    """Raise RecipeError where trainer ranks and the rollout workers beside them need more GPUs than there are."""
    cluster, rollouts = recipe.cluster, recipe.rollouts
    if not gpus:
        if cluster.strategy == "fsdp":
            raise RecipeError("cluster.strategy=fsdp needs GPUs: accelerate starts FSDP on none; use ddp or zero2 here")
        return  # a machine without GPUs shares its cores
    if cluster.processes > gpus:
        raise RecipeError(f"cluster.processes={cluster.processes}: this machine has {gpus} GPUs")
    is_elsewhere = rollouts.address is not None or "RAY_ADDRESS" in os.environ or cluster.rollout_nodes
    beside = rollouts.engine == "ray" and not is_elsewhere
    if beside and (needed := rollouts.workers * rollouts.tensor_parallel) > gpus - cluster.processes:
        raise RecipeError(
            f"rollouts.workers={rollouts.workers} x tensor_parallel={rollouts.tensor_parallel} need {needed} GPUs beside "
            f"cluster.processes={cluster.processes}; this machine has {gpus}"
        )


def check_heads(recipe: Recipe, *, is_dry: bool = False) -> None:
    """Raise RecipeError where the engine's ranks cannot share the model's attention heads evenly.

    A dry run asks no hub: of a model that this machine does not hold it says that it cannot tell.
    """
    parallel = recipe.rollouts.tensor_parallel
    if parallel == 1:
        return
    from huggingface_hub.errors import LocalEntryNotFoundError  # slow to import, as the next
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(recipe.model, trust_remote_code=recipe.trusts_code, local_files_only=is_dry)
        heads = config.get_text_config().num_attention_heads
    except (ValueError, OSError) as error:
        if is_dry and isinstance(error.__cause__, LocalEntryNotFoundError):
            what = f"whether it divides the heads of {recipe.model} could not be checked, it is not on this machine"
            say(f"rollouts.tensor_parallel={parallel}: {what}")
            return
        raise RecipeError(f"model {recipe.model!r} cannot be loaded: {error}") from error
    if heads % parallel:
        raise RecipeError(f"rollouts.tensor_parallel={parallel} does not divide the model's {heads} heads")


def check_port(port: int, *, key: str) -> None:
    """Raise RecipeError if something listens there already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise RecipeError(f"{key}={port}: the port is in use ({error.strerror}); choose another") from error


def run(command: Command, *, run_folder: Path) -> int:
    """Run to the end; return the exit code, 128 + signal where a signal ended the run after its checkpoint.

    SIGTERM and SIGINT are handed to the trainer ranks themselves: torchrun's agent would kill them after 30 s.
    """
    process = subprocess.Popen(
        command.words, env={**os.environ, **command.environment}, start_new_session=True, cwd=Path.cwd()
    )
    received: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for rank in ranks_of(process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        leave_nothing(process.pid)
    if code and received:
        return 128 + received[-1]
    if code == REFUSED:  # it has said what is wrong with the recipe, and left no folder
        return code
    if code:
        died = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        say(f"polyphony launch: the trainer group ended ({died}); go on with --resume {run_folder}")
    return code if code >= 0 else 128 - code


def ranks_of(agent: int) -> list[psutil.Process]:
    """Return the trainer ranks below accelerate's agent, or the one process that is its own rank."""
    try:
        family = [psutil.Process(agent), *psutil.Process(agent).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    return [child for child in family if _is_rank(child)] or family[:1]


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # one of a rank's own that ended meanwhile hides no rank
        return "RANK" in process.environ() and "polyphony.launch.cli" in process.cmdline()
    return False


def leave_nothing(group: int) -> None:
    """End what is left of the process group, such as ranks that wait for one that is gone."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


BUILD_S = 600.0
"""After so many seconds a lock that nobody here has open is no other machine's, either: the largest kernel takes minutes."""


def leave_no_killed_build(say: Callable[[str], None], *, patience_s: float = BUILD_S, poll_s: float = 1.0) -> None:
    """Remove locks of killed builds, waiting until each is `patience_s` old; call it before any rank of this machine runs.

    A lock that a process of this machine has open is left alone: its build will end. One that none has open may be that
    of another machine which shares the folder; hence the wait. `say` is told of every wait and removal.
    """
    for lock in locks():
        announced = False
        while (age := _age(lock)) is not None and not is_held(lock):
            if age >= patience_s:
                lock.unlink(missing_ok=True)
                what = "left by a build of a DeepSpeed kernel that was killed"
                say(f"polyphony launch: removed {lock}, {age:.0f} s old and {what}")
                break
            if not announced:
                say(
                    f"polyphony launch: {lock} is {age:.0f} s old and no process here has it open: another machine "
                    "builds this DeepSpeed kernel, or a killed build left it. "
                    f"Waiting until it is {patience_s:.0f} s old; delete it if nothing else runs"
                )
                announced = True
            time.sleep(poll_s)


def locks() -> list[Path]:
    """Return the locks of builds under torch's folder of extensions, `TORCH_EXTENSIONS_DIR` where that is set."""
    if own := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return sorted(Path(own).glob("*/lock"))
    from torch.utils.cpp_extension import get_default_build_root  # slow to import

    return sorted(Path(get_default_build_root()).glob("*/*/lock"))  # a folder for each Python and CUDA


def is_held(lock: Path) -> bool:
    """Whether a process of this machine, of those that may be looked into, has the file open."""
    path = str(lock.resolve())
    for process in psutil.process_iter():
        try:
            if any(file.path == path for file in process.open_files()):
                return True
        except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
            continue
    return False


def _age(lock: Path) -> float | None:
    """Seconds since the lock was made; None when it is gone."""
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None
