"""A frozen copy in the precision of its passes is the same reference in fewer bytes."""

import torch

from segrl.models.reference import FrozenCopy
from segrl.types import Completions


def held(module):
    """Return the bytes of its weights."""
    return sum(
        {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in module.parameters()}.values()
    )


@torch.no_grad()
def test_what_every_pass_would_cast_is_cast_once(policy, prefixes):
    tokens = torch.randint(10, 200, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 1])[:, None]
    said = Completions(tokens=tokens, mask=mask, texts=[""] * 4, finished=mask[:, 0])
    frozen = FrozenCopy(policy)
    before, full = held(frozen), frozen.logprobs(prefixes, said)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # as Lightning does
        cast_each_time = frozen.logprobs(prefixes, said)
        frozen.made_for(torch.bfloat16)
        assert torch.equal(frozen.logprobs(prefixes, said), cast_each_time)
        assert torch.equal(policy.logprobs(prefixes, said), cast_each_time)
    assert not torch.equal(full, cast_each_time)
    assert held(frozen) < 0.75 * before
    assert policy.model.dtype == torch.float32
