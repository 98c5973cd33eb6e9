"""The GPU kit agrees with the code: every part runs on a CPU at tiny shapes, and so does its report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SAID = {  # names of findings that a part has to have
    "machine": {"code", "versions", "varlen_attn"},
    "agree": {"float32", "bfloat16"},
    "tests": set(),
    "steps": {"built", "step", "median", "kernels, learning", "kernels, sampling"},
    "peer": {"built", "step"},
    "demo": {"32-true", "bf16-mixed"},
    "kernels": {
        "patch embedding, Conv3d", "patch embedding, one product", "tower attention, windows",
        "prefix attention, causal", "prefix attention, a new length each time",
        "completions' attention, padded", "sampling, softmax and draw", "sampling, a weight with an adapter",
        "head of completions, TF32",
    },
}  # fmt: skip


def check(out, part, code=0, **settings):
    """Run a part through the script that a GPU machine runs; return the findings."""
    there = {
        **os.environ,
        "PYTHON": sys.executable,
        "OUT": str(out),
        "REHEARSE": "1",
        "PARTS": part,
        **settings,
    }
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu_check.sh")], capture_output=True, text=True, env=there, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()], done.stdout


@pytest.mark.rehearsal
@pytest.mark.parametrize("part", SAID)
def test_a_part_works(tmp_path, part):
    found, printed = check(tmp_path, part)
    ends = [line for line in found if line.get("name") == "end"]
    logs = {path.name: path.read_text()[-3000:] for path in tmp_path.iterdir() if path.suffix != ".gz"}
    assert ends and all(end.get("rc") == 0 for end in ends), logs
    assert not [line for line in found if "error" in line or line.get("outcome") in ("FAILED", "ERROR")], logs
    assert SAID[part] <= {line.get("name") for line in found}
    assert "a rehearsal on a CPU" in printed or part != "machine"
    if part == "tests":
        assert sum(line.get("outcome") == "PASSED" for line in found) > 30
    if part == "steps":
        assert {line["kind"] for line in found if line.get("name") == "median"} >= {
            "graphs",
            "activations kept",
        }


def test_a_part_that_fails_or_hangs_does_not_stop_the_next(tmp_path):
    """One Python fails at once, and one never ends."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in *kernels*) exit 7 ;; *agree*) sleep 1000 ;; '
        f'*) exec {sys.executable} "$@" ;; esac\n'
    )
    python.chmod(0o755)
    found, _ = check(tmp_path, "kernels agree", 1, PYTHON=str(python), MOST="3")
    ends = {line["part"]: line for line in found if line.get("name") == "end"}
    assert ends["kernels"]["rc"] == 7 and ends["agree"]["rc"] in (124, 137)


# --- the report


def line(part, name, **rest):
    return {"part": part, "at_s": 1.0, "name": name, **rest}


def findings(step=3.0, date="2026-12-01", card="NVIDIA H100 80GB HBM3"):
    parts = {"rollout/sample": 1.1, "rollout/read prefixes": 0.2, "learn": 1.5}
    return [
        line("machine", "code", commit="abc123", date=date, rehearsal=False),
        line("machine", "versions", torch="2.11.0", cuda="13.0", trl="1.16.0", vllm="-"),
        line("machine", "card", card=card, total_gb=85.0),
        line("machine", "speeds", tflops=798, tb_per_s=3.0),
        {"part": "tests", "name": "tests/gpu/test_a.py::test_one", "outcome": "PASSED"},
        {"part": "tests", "name": "tests/gpu/test_a.py::test_two - assert 1 | 2", "outcome": "FAILED"},
        line("agree", "float32", logprob_off_max=1e-5, logprob_off_mean=1e-6, gradient_off=1e-5,
             worst_cosine=1.0, greedy_alike=1.0),
        line("steps", "built", parameters=3.75e9, prompts=8, group=8, tokens=256, side=768),
        line("steps", "median", kind="graphs", steps=3, step_s=step, parts_s=parts, peaks_gb={"learn": 66.5},
             reserved_gb=70.0, groups_in_a_pass=8, floor_s={"step": 1.34},
             times_the_floor=round(step / 1.34, 2)),
        line("steps", "kernels, sampling", kernels=10, busy_ms=3.0),
        line("steps", "kernels, sampling", kernel="gemm", ms=2.0, times=5),
        line("peer", "step", step_s=40.0, peak_gb=80.0), line("peer", "step", step_s=30.0, peak_gb=79.0),
        line("kernels", "sampling, down", ms=0.5, gb_per_s=2000),
        line("kernels", "tower", error="RuntimeError: no"),
        line("machine", "end", rc=0, seconds=9), line("tests", "end", rc=1, seconds=100),
    ]  # fmt: skip


@pytest.fixture
def gpu_report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_report

    return gpu_report


def written(tmp_path, name, lines):
    path = tmp_path / name
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def test_a_report_holds_what_was_found_beside_the_one_before(gpu_report, tmp_path, monkeypatch, capsys):
    reports = tmp_path / "gpu"
    for file, lines in (
        ("first", findings(step=4.0, date="2026-11-30")),
        ("other", findings(step=9.0, date="2026-12-01", card="NVIDIA H200")),
        ("second", findings()),
    ):
        path = written(tmp_path, file, lines)
        monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(path), "--to", str(reports)])
        assert gpu_report.main() == 0
    page = (reports / "2026-12-01-NVIDIA-H100-80GB-HBM3.md").read_text()
    assert capsys.readouterr().out.splitlines()[-1] == str(reports / "2026-12-01-NVIDIA-H100-80GB-HBM3.md")
    assert (
        "[2026-11-30-NVIDIA-H100-80GB-HBM3](2026-11-30-NVIDIA-H100-80GB-HBM3.md)" in page
    )  # the same card's
    assert "| graphs | 3 | 4 | 1.34 | 2.24 | 0.2 | 1.1 | 1.5 | 66.5 | 70 | 8 |" in page
    assert "40, 30 s a step, peak 80.0 GB; ours is 10.0 times as fast" in page  # the first step is warm-up
    assert "1 passed, 1 failed" in page and "test_two - assert 1 | 2 (failed before)" in page
    for words in (
        "commit abc123",
        "torch 2.11.0",
        "798 TFLOP/s",
        "| `gemm` | 2 | 5 |",
        "kernels: RuntimeError: no",
        "gb per s 2000",
    ):
        assert words in page, words
    assert "vllm" not in page


def test_reports_of_one_day_stand_beside_each_other(gpu_report, tmp_path, monkeypatch):
    path, reports = written(tmp_path, "a", findings()), tmp_path / "gpu"
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(path), "--to", str(reports)])
    assert [gpu_report.main() for _ in range(2)] == [0, 0]
    names = sorted(page.stem for page in reports.glob("*.md"))
    assert names == ["2026-12-01-NVIDIA-H100-80GB-HBM3", "2026-12-01-NVIDIA-H100-80GB-HBM3-2"]
    assert f"[{names[0]}]({names[0]}.md)" in (reports / f"{names[1]}.md").read_text()
    assert f"benchmarks/gpu/{names[1]}.md" in gpu_report.sentence(reports)


def test_a_later_call_replaces_the_parts_that_it_ran(gpu_report, tmp_path):
    again = [
        *findings()[:4],
        line("steps", "median", kind="graphs", steps=3, step_s=2.0, parts_s={}),
        line("steps", "end", rc=0, seconds=5),
    ]
    found = gpu_report.figures(
        gpu_report.read([written(tmp_path, "a", findings()), written(tmp_path, "b", again)])
    )
    assert found["steps"]["graphs"]["step_s"] == 2.0 and found["peer"]["ratio"] == 15.0
    assert found["kernels"]["kernels, sampling"] == [] and found["speeds"]["tflops"] == 798


def test_files_of_another_commit_or_a_rehearsal_stand_in_no_report(gpu_report, tmp_path, capsys):
    other = [
        line("machine", "code", commit="abc123", date="2026-12-01", rehearsal=True),
        line("peer", "step", step_s=1.0),
    ]
    found = gpu_report.figures(
        gpu_report.read([written(tmp_path, "a", other), written(tmp_path, "b", findings())])
    )
    assert found["peer"]["steps_s"] == [40.0, 30.0] and "a is left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"not json\n{}\n", "bad:1: a JSON object with a part must stand on each line; got 'not json'"),
        (b"", "bad must hold findings of gpu_check.sh; it holds none"),
        (b"\xff\xfe", "bad must be the results.jsonl of gpu_check.sh"),
        (None, "bad must be the results.jsonl of gpu_check.sh"),
    ],
)
def test_what_is_no_file_of_findings_is_refused_in_one_line(gpu_report, tmp_path, capsys, content, said):
    path = tmp_path / "bad"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        gpu_report.read([path])
    (only,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and said in only


def test_a_last_line_that_was_cut_off_loses_nothing_else(gpu_report, tmp_path):
    path = written(tmp_path, "a", findings())
    path.write_text(path.read_text() + '{"part": "kernels", "na')
    assert gpu_report.figures(gpu_report.read([path]))["peer"]["ratio"] == 10.0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"PARTS": "kernels nonsense"},
            "PARTS must be among machine agree tests steps peer demo kernels; got nonsense",
        ),
        ({"PYTHON": "/no/such/python"}, "PYTHON must name a Python that runs; got /no/such/python"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line_before_anything_runs(tmp_path, settings, said):
    there = {
        **os.environ,
        "PYTHON": sys.executable,
        "OUT": str(tmp_path),
        "REHEARSE": "1",
        "PARTS": "machine",
        **settings,
    }
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu_check.sh")], capture_output=True, text=True, env=there, check=False
    )
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1], done.stderr


def test_a_rehearsal_is_printed_and_never_filed(gpu_report, tmp_path, monkeypatch, capsys):
    path = written(tmp_path, "a", [line("machine", "code", commit="abc", date="2026-12-01", rehearsal=True)])
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(path), "--to", str(tmp_path / "gpu")])
    assert gpu_report.main() == 2 and not (tmp_path / "gpu").exists()
    assert "must be" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(path), "--print"])
    assert gpu_report.main() == 0 and "its figures mean nothing" in capsys.readouterr().out


def test_the_docs_say_what_the_latest_report_says(gpu_report):
    """`python benchmarks/gpu_report.py --docs` updates README.md and docs/speed.md."""
    for page in gpu_report.DOCS:
        assert page.read_text() == gpu_report.renewed(page, gpu_report.FOLDER), page


def test_the_docs_take_their_figures_from_the_latest_report(gpu_report, tmp_path):
    assert gpu_report.sentence(tmp_path) == "Nothing of it has run on a GPU yet."
    (tmp_path / "2026-12-01-X.json").write_text(json.dumps(gpu_report.figures(findings())))
    said = gpu_report.sentence(tmp_path)
    for words in (
        "NVIDIA H100",
        "3.8 billion weights (8 prompts of 768x768, 8 completions of 256 tokens) 3.00 s",
        "2.24 times its floor",
        "peak 66.5 GB",
        "10.0 times as fast as TRL",
        "1 of 2 tests",
    ):
        assert words in said, words
