"""Fixtures of the tests of sampling."""

import pytest

from segrl.data.synthetic import SyntheticScenes


@pytest.fixture(scope="session")
def scenes():
    return SyntheticScenes("test", 3, 0, 128, (0.5, 1.0), (1, 1))
