"""Experts and bases by their names: folders and adapters found, looked through, and refused in one line each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from polyphony.trainer.checkpoint_mark import is_unfinished
from polyphony.trainer.merging.tensors import Checkpoint
from polyphony.trainer.run.json_lines import read_object
from polyphony.trainer.teachers.weights import (
    ADAPTER,
    CONFIG,
    TeacherWeights,
    as_checkpoint,
    differing,
    is_same_model,
    lacking,
)

FETCHED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
"""Files of a model on the hub."""
TOKENIZER = tuple(
    """
    tokenizer.json tokenizer_config.json special_tokens_map.json vocab.json vocab.txt merges.txt tokenizer.model spiece.model
    """.split()  # noqa: SIM905
)
ALIKE = tuple(
    """
    model_type hidden_act num_attention_heads num_key_value_heads head_dim rope_parameters rms_norm_eps layer_norm_eps
    layer_norm_epsilon tie_word_embeddings sliding_window
    """.split()  # noqa: SIM905
)
"""What of a configuration must be the same: what weights of equal shapes are read by."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a name stands for: a folder with a checkpoint, or with an adapter.

    Example: `Source.of("runs/demo/final").is_adapter`
    """

    name: str
    folder: Path
    is_adapter: bool

    @classmethod
    def of(cls, name: str, what: str = "expert") -> Source:
        """Find it, in the hub's cache or on the hub if there is no such folder. Raises ValueError where it is not whole."""
        folder = Path(name)
        if not folder.is_dir():
            if name.startswith((".", "/", "~")) or folder.exists():
                raise ValueError(f"{what} {name}: no such folder")
            folder = _fetched(name, what)
        is_adapter = (folder / ADAPTER).is_file()
        if not is_adapter and not (folder / CONFIG).is_file():
            raise ValueError(f"{what} {name} has neither {CONFIG} nor {ADAPTER}")
        if is_unfinished(folder):
            raise ValueError(f"{what} {name} was cut off while being saved")
        pattern = "adapter_model.safetensors" if is_adapter else "*.safetensors"
        if why := lacking(folder, (pattern,)):
            raise ValueError(f"{what} {name}: {why}")
        return cls(name, folder, is_adapter)


def _fetched(name: str, what: str) -> Path:
    # slow to import
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(FETCHED)))
    except (OSError, ValueError) as error:
        raise ValueError(f"{what} {name}: neither a folder nor a model that the hub gives: {error}") from error


def found(experts: Sequence[str], base: str | None) -> tuple[list[Source], Source | None]:
    """Return experts and base. Raises ValueError for one that is missing, not whole or an adapter of another base."""
    of_base = None if base is None else Source.of(base, "base")
    if of_base is not None and of_base.is_adapter:
        raise ValueError(f"base {base} is an adapter: give the model that it is of")
    sources = [Source.of(name) for name in experts]
    for source in sources:
        if not source.is_adapter:
            continue
        of = str(read_object(source.folder / ADAPTER).get("base_model_name_or_path"))
        if base is None:
            raise ValueError(f"expert {source.name} is an adapter of {of}: say so with --base {of}")
        if not is_same_model(of, base):
            raise ValueError(f"expert {source.name} is an adapter of {of}, the base is {base}")
    return sources, of_base


@contextmanager
def opened(sources: Sequence[Source], base: Source | None) -> Iterator[tuple[list[Checkpoint], Checkpoint | None]]:
    """Have all of them as checkpoints, an adapter merged into a copy of the base meanwhile.

    Raises ValueError where they are not of one shape and vocabulary.
    """
    with ExitStack() as stack:
        experts = []
        for source in sources:
            folder = source.folder
            if source.is_adapter:
                assert base is not None
                weights = TeacherWeights("adapter", str(folder))
                folder = Path(stack.enter_context(as_checkpoint(weights, base=str(base.folder))))
            experts.append(Checkpoint.of(source.name, folder))
        of_base = None if base is None else Checkpoint.of(base.name, base.folder)
        first, *others = experts if of_base is None else [of_base, *experts]
        for other in others:
            first.refuse_other_shapes(other)
            _refuse_other_config(first, other)
            _refuse_other_vocabulary(first, other)
        yield experts, of_base


def _refuse_other_config(first: Checkpoint, other: Checkpoint) -> None:
    """Raise ValueError where weights of the same shapes are read otherwise."""
    ours, theirs = (read_object(model.folder / CONFIG) for model in (first, other))
    if ours == theirs:
        return
    # slow to import
    from transformers import AutoConfig

    with suppress(ValueError, OSError, KeyError):  # a model of its own code goes by what its file says
        # fills in what a version of Transformers leaves out, or calls otherwise
        ours, theirs = (AutoConfig.from_pretrained(m.folder).get_text_config().to_dict() for m in (first, other))
    for name in ALIKE:
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{other.name}: {name} is {theirs.get(name)} in its {CONFIG}, {ours.get(name)} in that of {first.name}: the "
                "merged weights would fit neither"
            )


def _refuse_other_vocabulary(first: Checkpoint, other: Checkpoint) -> None:
    names = (*TOKENIZER, *{path.name for model in (first, other) for path in model.folder.glob("*.tiktoken")})
    if all(_content(first.folder / name) == _content(other.folder / name) for name in names):
        return
    # slow to import
    from transformers import AutoTokenizer

    try:
        ours, theirs = (AutoTokenizer.from_pretrained(model.folder) for model in (first, other))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{other.name}: its vocabulary cannot be compared with that of {first.name}: {error}"
        ) from error
    if differs := differing(ours, theirs):
        raise ValueError(f"{other.name} has another vocabulary than {first.name}: {differs}")


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None
