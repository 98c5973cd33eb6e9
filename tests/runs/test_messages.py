"""Messages of faults that need no run: a full disk, a closed pipe, a value of another kind."""

from __future__ import annotations

import errno
import os
import sys

import pytest
from omegaconf import OmegaConf

from segrl.runs import command, configuration
from segrl.runs.command import refusal
from segrl.runs.messages import Said, dotted, explain
from segrl.runs.report import check_same_samples


@pytest.mark.parametrize(
    ("command", "arguments", "key"),
    [
        ("train", ["+experiment=demo"], "paths.runs"),
        ("evaluate", ["+suite=synthetic"], "paths.runs"),
        ("export", ["ckpt=a", "out=b"], "out"),
        ("score", ["pred=a", "gt=b"], "out"),
        ("prepare_check", [], "out"),
        ("prepare_traces", ["data.root=a", "out=b.jsonl"], "out"),
    ],
)
def test_a_full_disk_is_reported_with_the_key_of_what_is_written(command, arguments, key):
    full = OSError(errno.ENOSPC, "No space left on device", "FILE")
    configuration.register_resolvers()
    keys = dotted(configuration.compose_job(command, arguments))
    assert key in keys
    (line,) = explain(full, Said(arguments, []), lambda: keys)
    assert line.startswith(f"{key}: no space is left to write FILE")


@pytest.mark.parametrize("value", ["null", "[1,2]", "''", "${oc.env:SEGRL_HAS_NO_SUCH_NAME}"])
def test_weights_that_name_no_folder_are_refused_by_their_own_key(value):
    (line,) = refusal("train", ["+experiment=demo", f"policy.weights={value}"])
    assert line.startswith("policy.weights: must be text; got "), line


def test_weights_that_name_no_folder_have_no_instructions_beside_them(tmp_path, monkeypatch):
    from segrl.prompts.instructions import NAME

    (tmp_path / NAME).touch()
    monkeypatch.chdir(tmp_path)
    for weights in (None, "", OmegaConf.create([1, 2]), 3):
        assert configuration.instructions_of(weights) is None
    assert configuration.instructions_of(str(tmp_path)) == str(tmp_path / NAME)


def _broken(*_):
    raise BrokenPipeError(errno.EPIPE, "Broken pipe")


class Standing:
    """Stands for stdout with another descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def fileno(self) -> int:
        return self.descriptor


@pytest.mark.parametrize("reader_left", [True, False])
def test_a_broken_pipe_of_a_job_is_not_taken_for_a_closed_stdout(monkeypatch, reader_left):
    reads, writes = os.pipe()
    monkeypatch.setattr(sys, "stdout", Standing(writes))
    monkeypatch.setattr(sys, "argv", ["segrl"])
    monkeypatch.setattr(command, "_run", _broken)
    if reader_left:
        os.close(reads)
    with pytest.raises(SystemExit if reader_left else BrokenPipeError) as end:
        command.enter("train", print)
    if reader_left:
        assert end.value.code == 1 and os.write(writes, b"goes nowhere")
    else:
        os.close(reads)
    os.close(writes)


def test_samples_that_changed_are_reported_with_the_key_of_their_set():
    with pytest.raises(ValueError, match=r"^data\.module\.test\.cod10k: must hold the samples scored before"):
        check_same_samples({"cod10k": {"a": {}}}, {"cod10k": ["b"]})
