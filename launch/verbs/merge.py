"""`polyphony merge`: experts become one model, by weights that are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from polyphony.launch.verbs.evaluate import weights_of
from polyphony.trainer.merging.settings import MergeSettings


def merge_experts(experts: Sequence[str], out: Path, *, base: str | None, settings: MergeSettings) -> Path:
    """Merge experts, each a checkpoint, an adapter, a run folder or a name on the hub; return the new folder.

    Raises ValueError in one line where they do not fit, before torch comes where their number or the settings are wrong.
    """
    settings.check(len(experts), has_base=base is not None)
    # slow to import
    from polyphony.trainer.merging.merge import merge

    return merge([weights_of(name) for name in experts], out, settings=settings, base=base and weights_of(base))
