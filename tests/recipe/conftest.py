"""`home`: a folder with data and a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.recipe import makers


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return makers.folder(tmp_path)
