"""What `tests.forks` has loaded before it forks: all that a run imports. Only its server imports this."""

from polyphony.launch.cli import set_environment

set_environment()

# ruff: noqa: E402, F401 (loaded after the environment is set, for those who will import them)
import deepspeed
import vllm.v1.engine.llm_engine
from accelerate.utils import gather_object
from trl import GRPOTrainer
from vllm import LLM

import polyphony.launch.lab.world
import polyphony.launch.report.report
import polyphony.launch.train
import polyphony.launch.verbs.probe
from polyphony.trainer.grpo import DomainGRPOTrainer
