"""Tests that need a CUDA device; skipped, with that reason, where there is none."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items):
    missing = pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(missing)
