"""Find keys that the user sets although the stage, or the evaluation, does not read them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from segrl.runs.schema.interpolations import Fault, absolute, lookup, references

_TRAINING = {"stage", "reward", "reference", "callbacks", "test_before"}
_FABRIC = {"accelerator", "devices", "num_nodes", "precision"}  # keys of the trainer that an evaluation reads
_BOUNDS = {"stage.surrogate.low", "stage.surrogate.high"}
_UPDATES = ("updates_per_rollout", "epochs_per_rollout")
_BUILT = {"policy", "reference", "head", "grammar", "reward", "rollout"}
_OVERWRITTEN = {"data.batch_size"}  # segrl.evaluate sets it to 1


def unread(raw: dict[str, Any], keys: Collection[str]) -> Iterator[Fault]:
    """Yield a fault for each key that is set and not read.

    Args:
        raw: the configuration of a training or an evaluation, with unresolved interpolations.
        keys: keys of values, and names of groups, that the command line sets.
    """
    raw, evaluates = absolute(raw), "suite" in raw
    for key in sorted(keys):
        said = _in_evaluation(raw, key) if evaluates else _in_training(raw, key)
        if said is not None:
            yield Fault(key, said)


def _in_training(raw: dict[str, Any], key: str) -> str | None:
    """Return why a key must not be set in a training, or None if it may be set."""
    root = key.partition(".")[0]
    if key in _BOUNDS and all(raw["stage"].get(name) == 1 for name in _UPDATES):
        return (
            "must not be set with one update per rollout, "
            f"where the ratio that it bounds is 1 (stage.{_UPDATES[0]}=2)"
        )
    if root not in _BUILT or raw.get(root) is None:  # reference=none sets no keys
        return None
    if root in {ref.split(".")[0] for ref in references(raw)}:
        return None
    return f"must not be set for {str(raw['stage']['_target_']).rpartition('.')[2]}, which reads no {root}"


def _in_evaluation(raw: dict[str, Any], key: str) -> str | None:
    """Return why a key must not be set in an evaluation, or None if it may be set."""
    root, _, rest = key.partition(".")
    if root in _TRAINING:
        return f"must not be set in an evaluation, which reads no {root}"
    if key == "trainer" and isinstance(raw["trainer"].get("strategy"), dict):
        return "must not shard weights in an evaluation, which distributes samples: write trainer=ddp"
    if root == "trainer" and rest and rest.split(".")[0] not in _FABRIC:
        return f"must not be set in an evaluation, which reads no {key}"
    if key == "policy.gradient_checkpointing":
        return f"must not be set in an evaluation, which makes no backward pass and reads no {key}"
    if root != "data" or _reads_data(raw, key, raw["testsets"]):
        return None
    if _reads_data(raw, key, None):
        return "must not be set together with +suite or +testset, whose samples are scored instead"
    return f"must not be set in an evaluation, which reads no {key}"


def _reads_data(raw: dict[str, Any], key: str, testsets: dict[str, Any] | None) -> bool:
    """Return whether an evaluation reads a key of `data`, directly or through references.

    Args:
        raw: see `unread`.
        key: `data` or a key in it.
        testsets: the test sets that are scored; if None or empty, those of `data.module.test` are.
    """
    found = {"data.workers"} if testsets else {"data.workers", "data.module.test", "data.published"}
    if key == "data":
        return not testsets
    other = {name: node for name, node in raw.items() if name not in {"data", "trainer", *_TRAINING}}
    waiting = found | references(other)
    while waiting:
        ref = waiting.pop()
        found.add(ref)
        try:
            waiting |= references(lookup(raw, ref)) - found
        except KeyError:  # reported by `walk`
            continue
    found -= _OVERWRITTEN
    return any(f"{ref}.".startswith(f"{key}.") or f"{key}.".startswith(f"{ref}.") for ref in found)
