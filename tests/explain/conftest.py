from __future__ import annotations

from tests.evaluation.conftest import compiled_once  # noqa: F401
