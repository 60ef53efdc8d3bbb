from __future__ import annotations

import pytest
from released import Released


@pytest.fixture(scope="session")
def xception() -> Released:
    return Released("xception")


@pytest.fixture(scope="session")
def inception_v3() -> Released:
    return Released("inception_v3")


@pytest.fixture(scope="session", params=["xception", "inception_v3"])
def released(request) -> Released:
    return request.getfixturevalue(request.param)
