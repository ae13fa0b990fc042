from __future__ import annotations

import pytest
from small import Marked, mark


@pytest.fixture(scope="session")
def marked() -> Marked:
    return mark()
