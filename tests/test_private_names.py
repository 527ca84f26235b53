"""Every private name of TRL, Transformers, vLLM and others that we rely on: this list is complete, and each is still there.

Private is what begins with one underscore. A name that moves has to be looked up in the new version, where it is used here.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import HOUSE

PACKAGES = ("trainer", "launch", "curricula", "rewards")
RELIED_ON = {
    # TRL's trainer and Transformers' beneath it: overridden, called, read or set
    "trl.trainer.grpo_trainer:GRPOTrainer": """
        _buffered_inputs _calculate_rewards _compute_loss _entropy_bonus_enabled _generate_and_score_completions
        _generate_single_turn _get_per_token_logps_and_entropies _last_loaded_step _log_completion_extra _logs
        _metrics _step _tokenize_prompts _tokenizer _tool_call_loop
    """,
    "trl.trainer.sft_trainer:SFTTrainer": "_total_train_tokens",
    "transformers.trainer:Trainer": """
        _get_grad_norm _get_output_dir _get_train_sampler _load_from_checkpoint _load_optimizer_and_scheduler
        _load_rng_state _prepare_inputs _run_epoch _save_checkpoint
    """,
    "transformers.training_args:TrainingArguments": "_n_gpu",
    "transformers.configuration_utils:PreTrainedConfig": "_attn_implementation",
    # TRL's engine
    "trl.generation.vllm_generation:VLLMGeneration": "_init_vllm _iter_named_params",
    # vLLM's CPU build, and its models by Transformers
    "vllm._custom_ops": "_supports_onednn",
    "vllm.model_executor.models.transformers.base:Base": "_decorate_for_torch_compile",
    # adapters, W&B's dashboards
    "peft.tuners.lora:Linear": "_caches",
    "wandb_workspaces.workspaces:Workspace": "_to_model",
    # Python's own
    "asyncio": "_get_running_loop",
    "atexit": "_run_exitfuncs",
    "threading": "_shutdown",
}
PRIVATE_MODULES = {"vllm._custom_ops", "_ast"}
NOT_OTHERS = {"_fields", "_link", "_ref", "_Hash"}
"""Documented, of `ast` and named tuples; slots of ours; a type that only annotations know."""
HOLDERS = ("trainer", "generation", "vllm_generation")
"""What a variable or attribute with a trainer or an engine of TRL's is called."""


def trees() -> Iterator[ast.Module]:
    for package in PACKAGES:
        for path in sorted((HOUSE / package).rglob("*.py")):
            yield ast.parse(path.read_text())


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def made_here(tree: ast.AST) -> set[str]:
    """Names that are defined in the code, or set on `self`."""
    made = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            made.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            made.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            made.add(node.attr)
    return {name for name in made if is_private(name)}


def read_of(tree: ast.AST) -> dict[str, set[str]]:
    """Private names that are read of anything, with what they are read of."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            found.setdefault(node.attr, set()).add(ast.unparse(node.value))
    return found


def words_of(owner: type) -> set[str]:
    """Attributes that foreign classes have or set, the class and those it inherits from."""
    words: set[str] = set()
    for base in owner.__mro__[:-1]:
        words |= set(vars(base))
        if base.__module__ not in sys.builtin_module_names:
            tree = ast.parse(inspect.getsource(base))
            words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return words


def foreign_bases() -> dict[str, type]:
    trainer = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer
    engine = importlib.import_module("trl.generation.vllm_generation").VLLMGeneration
    tuner = importlib.import_module("trl.trainer.sft_trainer").SFTTrainer
    return {"GRPOTrainer": trainer, "SFTTrainer": tuner, "VLLMGeneration": engine, "Engine": engine}


def relied_on() -> set[str]:
    """What our code takes of others: read without being made here, overridden, or read of a trainer of TRL's."""
    made, found = set(), set()
    parsed = list(trees())
    for tree in parsed:
        made |= made_here(tree)
    bases = foreign_bases()
    trl = words_of(bases["GRPOTrainer"]) | words_of(bases["VLLMGeneration"])
    for tree in parsed:
        for name, holders in read_of(tree).items():
            is_trls = name in trl and any(holder.split(".")[-1] in HOLDERS for holder in holders)
            if name not in made or is_trls:
                found.add(name)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                of_base = [bases[ast.unparse(base)] for base in node.bases if ast.unparse(base) in bases]
                own = made_here(node) | {n for n, holders in read_of(node).items() if holders & {"self", "super()"}}
                found |= {name for base in of_base for name in own & words_of(base)}
    return found - NOT_OTHERS


def test_the_list_is_complete_and_names_nothing_that_is_not_used():
    assert relied_on() == {name for names in RELIED_ON.values() for name in names.split()}


def test_private_modules_are_those_we_know():
    imported = set()
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    private = {n for n in imported if any(is_private(part) for part in n.split(".")) and not n.startswith("polyphony")}
    assert {next(m for m in PRIVATE_MODULES if n.startswith(m)) for n in private} == PRIVATE_MODULES


@pytest.mark.parametrize("owner", RELIED_ON)
def test_each_is_still_there(owner):
    module, _, name = owner.partition(":")
    found = importlib.import_module(module)
    words = set(vars(found)) if not name else words_of(getattr(found, name))
    assert set(RELIED_ON[owner].split()) - words == set()
