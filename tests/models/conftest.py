"""Fixtures of the tests of policies."""

import pytest

from segrl.data.synthetic import SyntheticScenes
from segrl.prompts.tags import SegR1Points, SegR1Tags


@pytest.fixture(params=["qwen3_vl", "qwen2_5_vl"])
def policy(request, nano_policy):
    return nano_policy(request.param)


@pytest.fixture
def prefixes(policy):
    """Return two prefixes of unequal length."""
    scenes = SyntheticScenes("test", 2, 0, 128, (0.5, 1.0), (1, 1))
    chats = SegR1Tags(4, 8).messages(None), SegR1Points(8).messages("the left fish")
    return [policy.encoder.encode(chat, scenes[i].image) for i, chat in enumerate(chats)]
