"""The shape of what a script hands over as to TRL's trainer, checked before anything is loaded, in the script's words."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, TrainingArguments
from trl.trainer.grpo_config import GRPOConfig

from polyphony.curricula.declarations import nearest
from polyphony.curricula.records import Domain
from polyphony.rewards.registry import REGISTRY
from polyphony.trainer.domains import code_of

SCRIPTS_WORDS = {
    "train": "train_dataset",
    "heldout": "eval_dataset",
    "reward": "reward_funcs",
    "environment": "environment_factory",
    "tools": "tools",
}
"""What a domain's keys are called in a script."""
ELSEWHERE = {"tokenizer": "processing_class", "dataset": "train_dataset", "config": "args", "training_args": "args"}
"""Names that other trainers have, or had."""
QUANTIZED = ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "hf_quantizer")
"""What Transformers leaves on a model that is quantized."""


def refuse_misspelt(unknown: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise TypeError for an argument that there is not, with the nearest that there is."""
    for name in unknown:
        meant = nearest(name, [one for one in known if one not in ("self", "unknown")])
        meant = f"did you mean {ELSEWHERE[name]!r}?" if name in ELSEWHERE else meant
        raise TypeError(f"DomainGRPOTrainer has no argument {name!r}; {meant}")


def in_place(reward_funcs: Any, args: Any) -> tuple[Any, Any]:
    """Return rewards and arguments; the latter may stand second, where a trainer of domains alone has no rewards to say.

    Raises ValueError for what stands in the place of another.
    """
    if is_rows(reward_funcs):
        raise ValueError(f"reward_funcs: got rows, a {type(reward_funcs).__name__}: give them as train_dataset=")
    if not isinstance(reward_funcs, TrainingArguments):
        return reward_funcs, args
    if args is not None:
        raise ValueError(
            f"args: two stand for it, a {type(reward_funcs).__name__} second and a {type(args).__name__} third: give "
            "reward_funcs=, args= and train_dataset= by their names"
        )
    return None, reward_funcs


def is_rows(one: Any) -> bool:
    """Whether something is a table of rows, of whatever library."""
    return hasattr(one, "column_names") or hasattr(one, "iterrows")


def refuse_no_model(model: Any) -> None:
    """Raise ValueError for what is neither a name, a folder nor a model that is loaded."""
    if isinstance(model, str):
        if model.startswith(("/", ".", "~")) and not Path(model).is_dir():
            raise ValueError(f"model {model!r}: no such folder")
        return
    if not hasattr(model, "name_or_path"):
        how = ": give str(..) of it" if isinstance(model, Path) else ""
        raise ValueError(f"model: expected a name, a folder or a model that is loaded, got {_named(model)}{how}")


def refuse_other_args(args: Any) -> None:
    """Raise ValueError for anything but TRL's arguments, or nothing."""
    if args is None or isinstance(args, GRPOConfig):
        return
    how = ": give GRPOConfig(**args)" if isinstance(args, Mapping) else ""
    how = ": give rows as train_dataset=" if is_rows(args) else how
    raise ValueError(f"args: expected a GRPOConfig, got {type(args).__name__}{how}")


def refuse_no_rows(given: Any, where: str) -> None:
    """Raise ValueError for splits, columns and tables of other libraries, with how rows are made of them."""
    if hasattr(given, "iterrows"):
        raise ValueError(f"{where}: expected rows, got a table of pandas: give Dataset.from_pandas(..)")
    if isinstance(given, Mapping) and "prompt" in given:
        raise ValueError(f"{where}: expected rows, got columns {', '.join(given)}: give Dataset.from_dict(..)")
    if isinstance(given, Mapping):
        raise ValueError(
            f"{where}: expected rows, got splits {', '.join(given)}: give {where}[{next(iter(given), 'train')!r}]"
        )


def quantized_by(model: Any, given: Any, args: GRPOConfig) -> str | None:
    """Return by what a policy is quantized, in a script's words; None where it is not. `model` is one, or its name."""
    if given is not None:
        return "quantization_config"
    said = args.model_init_kwargs if isinstance(args.model_init_kwargs, Mapping) else {}
    for name in ("quantization_config", "load_in_4bit", "load_in_8bit"):
        if said.get(name):
            return f"args.model_init_kwargs[{name!r}]"
    if isinstance(model, str):
        try:
            config = AutoConfig.from_pretrained(model, **code_of(args))
        except OSError as error:
            raise ValueError(f"model {model!r} cannot be loaded: {first_line(error)}") from error
        found = getattr(config, "quantization_config", None)
        how = found.get("quant_method", "?") if isinstance(found, Mapping) else type(found).__name__
        return f"model {model}, whose config.json says quantization_config ({how})," if found else None
    return "model, which is quantized," if any(getattr(model, name, None) for name in QUANTIZED) else None


def refuse_misshapen(tools: Any, environment_factory: Any) -> None:
    """Raise ValueError for tools that are no list of functions, and for what cannot make an environment."""
    if tools is not None and not isinstance(tools, list | tuple):
        raise ValueError(f"tools: expected a list of functions, got {_named(tools)}")
    if lost := [tool for tool in tools or () if not callable(tool)]:
        raise ValueError(f"tools: expected functions, got {_named(lost[0])} among them")
    several = isinstance(environment_factory, Mapping)
    if several and not environment_factory:
        raise ValueError("environment_factory: an empty dict: expected environments by what the column calls them")
    for name, factory in environment_factory.items() if several else [(None, environment_factory)]:
        if factory is not None and not callable(factory):
            where = "environment_factory" if name is None else f"environment_factory[{name!r}]"
            raise ValueError(
                f"{where}: expected a class, or a function that makes an environment, got {_named(factory)}"
            )


def refuse_no_reward(rewards: Sequence[Any]) -> None:
    """Raise ValueError for what is neither a function nor a model, and for the name of a reward of ours."""
    for one in rewards:
        if isinstance(one, type):
            raise ValueError(f"reward_funcs: got the class {one.__name__}: give one that is made, {one.__name__}(..)")
        if not isinstance(one, str) and not callable(one):
            raise ValueError(f"reward_funcs: expected functions, models or names of models, got {one!r:.60}")
        if isinstance(one, str) and one in REGISTRY and not Path(one).exists():
            raise ValueError(
                f"reward_funcs: {one!r} is a reward of ours, and names of models stand here: give "
                f"polyphony.rewards.find_reward({one!r}), or a domain in domains="
            )


def refuse_unseen(domains: Sequence[Domain]) -> None:
    """Raise ValueError for a domain that a run could not measure: an `eval_dataset` has rows of others alone."""
    if unseen := [domain.name for domain in domains if domain.heldout is None]:
        has = ", ".join(domain.name for domain in domains if domain.heldout is not None)
        raise ValueError(
            f"eval_dataset: has no rows of domain {unseen[0]!r}, which run= measures; it has {has}: call one of them so, "
            "or the trained one as one of them by domain_name="
        )


def in_scripts_words(message: str, names: Collection[str]) -> str:
    """Return a message about domains as a script knows what they are made of.

    Example: `in_scripts_words("domains.default.train: no rows", ["default"])` is "train_dataset: no rows"
    """
    keys = "|".join(SCRIPTS_WORDS)
    for name in names:
        key = re.compile(rf"domains\.{re.escape(name)}\.({keys})\b")
        message = key.sub(lambda found: SCRIPTS_WORDS[found[1]], message)
    return message


def first_line(error: Exception) -> str:
    """Return what an error of a hub says before it advises."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _named(one: Any) -> str:
    name = getattr(one, "__name__", None)
    return f"{type(one).__name__} {name}" if name else f"{one!r:.60}"
