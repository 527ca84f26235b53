"""Where a teacher's weights are, and what is wrong with them, found before any are loaded.

Transformers is imported inside functions: a recipe that names no such weights does without.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open

from polyphony.trainer.checkpoint_mark import is_unfinished
from polyphony.trainer.run.folder import RunFolder
from polyphony.trainer.run.json_lines import read_object
from polyphony.trainer.teachers.settings import CURRENT, START, TeacherSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER, CONFIG = "adapter_config.json", "config.json"
FILES = {ADAPTER: ("adapter_model.safetensors", "adapter_model.bin"), CONFIG: ("*.safetensors", "pytorch_model*.bin")}
"""What a folder of weights says of them, and in which files they are: the first kind that is there is loaded."""
SHARD = re.compile(r"(?P<model>(?:pytorch_|adapter_)?model)-\d+-of-(?P<n>\d+)")
PICKLED = b"\x80"
"""What files of PyTorch before 1.6 begin with; later ones are zip files."""


@dataclass(frozen=True, slots=True)
class TeacherWeights:
    """Which weights a teacher has.

    Example: `TeacherWeights.of("tutor", TeacherSettings(model="self@start"), base="Qwen/Qwen3-0.6B").kind` is `start`.
    """

    kind: Literal["current", "start", "adapter", "checkpoint", "endpoint"]
    path: str = ""
    """A folder, a name on the hub, or an endpoint's address."""

    @classmethod
    def of(cls, name: str, settings: TeacherSettings, *, base: str) -> TeacherWeights:
        """Return them, found but not read; `base` is the policy's model.

        Raises ValueError for a folder that is not there, not whole, or of an adapter of another model.
        """
        if settings.endpoint is not None:
            # httpx is slow to import
            from polyphony.trainer.teachers.endpoint import TeacherEndpoint

            return cls("endpoint", TeacherEndpoint.of(name, settings).url)
        if settings.model in (CURRENT, START):
            return cls("current" if settings.model == CURRENT else "start")
        model = str(settings.model)
        where, folder = f"teachers.{name}.model", Path(model)
        if not folder.is_dir():
            if model.startswith((".", "/", "~")) or folder.exists():
                raise ValueError(f"{where}: folder {folder} does not exist")
            return cls("checkpoint", model)
        if not any((folder / file).is_file() for file in FILES) and (final := RunFolder(folder).final).is_dir():
            model, folder = str(final), final
        said = next((file for file in (ADAPTER, CONFIG) if (folder / file).is_file()), None)
        if said is None or is_unfinished(folder):
            why = "was cut off while being saved" if is_unfinished(folder) else f"has neither {CONFIG} nor {ADAPTER}"
            raise ValueError(f"{where}: {folder} {why}")
        if why := lacking(folder, FILES[said]):
            raise ValueError(f"{where}: {folder}: {why}")
        if said == CONFIG:
            return cls("checkpoint", model)
        of = str(read_object(folder / ADAPTER).get("base_model_name_or_path"))
        if not is_same_model(of, base):
            raise ValueError(
                f"{where}: {folder} is an adapter of {of}, the policy is {base}: give the merged checkpoint, a run's final/"
            )
        return cls("adapter", model)


@contextmanager
def as_checkpoint(weights: TeacherWeights, *, base: str, trusts_code: bool = False) -> Iterator[str]:
    """Have the weights as a folder, or a name on the hub, that loads by itself: an adapter is merged into a copy meanwhile.

    `base` is the policy's model, which `self` and `self@start` are as well.
    """
    if weights.kind != "adapter":
        yield weights.path or base
        return
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code = {"trust_remote_code": trusts_code}
    with tempfile.TemporaryDirectory() as copied:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", **code)
        PeftModel.from_pretrained(model, weights.path).merge_and_unload().save_pretrained(copied)
        AutoTokenizer.from_pretrained(base, **code).save_pretrained(copied)
        yield copied


def is_same_model(left: str, right: str) -> bool:
    """Whether two names are of one folder, or one name on the hub."""
    return left == right or (Path(left).is_dir() and Path(left).resolve() == Path(right).resolve())


def lacking(folder: Path, patterns: tuple[str, ...]) -> str:
    """Return what is missing or damaged among files of weights; empty where nothing is."""
    found = next((files for pattern in patterns if (files := sorted(folder.glob(pattern)))), None)
    if found is None:
        return f"no weights ({', '.join(patterns)})"
    for index in folder.glob("*.index.json"):
        shards = set(read_object(index).get("weight_map", {}).values())
        if gone := sorted(shards - {path.name for path in folder.iterdir()}):
            return f"{gone[0]} is missing, which {index.name} names"
    if why := _cut_short(found):
        return why
    for path in found:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="np"):
                    pass
            except (SafetensorError, OSError) as error:
                return f"{path.name} is damaged: {error}"
        elif not _is_pytorch(path):
            return f"{path.name} is damaged: no file of PyTorch's"
    return ""


def _is_pytorch(path: Path) -> bool:
    with path.open("rb") as file:
        return is_zipfile(file) or (file.seek(0) == 0 and file.read(1) == PICKLED)


def _cut_short(found: Sequence[Path]) -> str:
    """Return what is missing of weights that several files hold, by the files' names."""
    names = {path.name for path in found}
    for path in found:
        if (of := SHARD.fullmatch(path.stem)) is None or f"{of['model']}{path.suffix}" in names:
            continue
        alike = [name for name in names if name.startswith(f"{of['model']}-") and f"-of-{of['n']}." in name]
        if len(alike) < int(of["n"]):
            return f"{len(alike)} of {int(of['n'])} files are there: {', '.join(sorted(alike))}"
        if not (index := path.with_name(f"{of['model']}{path.suffix}.index.json")).is_file():
            return f"{index.name} is missing, by which {path.name} is loaded"
    return ""


def check_vocabulary(
    name: str, weights: TeacherWeights, tokenizer: PreTrainedTokenizerBase, *, trusts_code: bool = False
) -> None:
    """Raise ValueError where a teacher's tokens are not the policy's; rows that only pad its embedding do not matter."""
    if weights.kind != "checkpoint":
        return
    from transformers import AutoConfig, AutoTokenizer

    where = f"teachers.{name}.model"
    try:
        theirs = AutoTokenizer.from_pretrained(weights.path, trust_remote_code=trusts_code)
        config = AutoConfig.from_pretrained(weights.path, trust_remote_code=trusts_code)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{where}: {weights.path}: its vocabulary cannot be compared with the policy's: {error}"
        ) from error
    if differs := differing(tokenizer, theirs):
        raise ValueError(f"{where}: {weights.path} has another vocabulary than the policy: {differs}")
    if (rows := config.get_text_config().vocab_size) <= (last := max(tokenizer.get_vocab().values())):
        raise ValueError(f"{where}: {weights.path} has an embedding of {rows} tokens, the policy's last is {last}")


def differing(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str:
    """Return the first difference of two vocabularies in words: a token's id, a special token; empty where there is none.

    Padding is no difference: it is masked.
    """
    left, right = ours.get_vocab(), theirs.get_vocab()
    if odd := sorted(token for token in left.keys() | right.keys() if left.get(token) != right.get(token)):
        return f"token {odd[0]!r} is {left.get(odd[0], 'none')} here and {right.get(odd[0], 'none')} there"
    mine, its = _special(ours), _special(theirs)
    if odd := sorted(name for name in mine.keys() | its.keys() if mine.get(name) != its.get(name)):
        return f"{odd[0]} is {mine.get(odd[0])!r} here and {its.get(odd[0])!r} there"
    return ""


def _special(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, Any]:
    return {name: token for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
