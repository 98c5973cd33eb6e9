"""Write a report of what `gpu_check.sh` found on a GPU, beside the previous report.

`python benchmarks/gpu_report.py results.jsonl` writes benchmarks/gpu/DATE-CARD.md and its figures as
DATE-CARD.json. It compares them with the latest earlier report of the same card (or of any), and puts the
figures into README.md and docs/speed.md. `--print` only prints. `--docs` updates README.md and docs/speed.md
from the latest report. Several files make one report: what a later file holds of a part replaces what an
earlier one holds.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "gpu"
DOCS = (HERE.parent / "README.md", HERE.parent / "docs" / "speed.md")
BEGIN, END = "<!-- figures of a GPU: benchmarks/gpu_report.py writes them -->", "<!-- /figures of a GPU -->"
NOT_YET = "Nothing of it has run on a GPU yet."
KERNELS = 12

Line = dict[str, Any]


def read(paths: list[Path]) -> list[Line]:
    """Return the findings; each part comes from the last file that has it.

    Files of another commit, card or rehearsal than the last file's are left out, and named.
    """
    files = [(path, lines_of(path)) for path in paths]
    of_last = _made_by(files[-1][1])
    parts: dict[str, list[Line]] = {}
    for path, lines in files:
        if _made_by(lines) != of_last:
            print(
                f"gpu_report: {path} is left out, for it is of another commit, card or rehearsal",
                file=sys.stderr,
            )
            continue
        here: dict[str, list[Line]] = defaultdict(list)
        for line in lines:
            here[line["part"]].append(line)
        parts.update(here)
    return [line for lines in parts.values() for line in lines]


def _made_by(lines: list[Line]) -> list[Any]:
    """Return what findings must have in common to stand in one report."""
    found = {line.get("name"): line for line in lines if line["part"] == "machine"}
    code, card = found.get("code", {}), found.get("card", {})
    return [code.get("commit"), code.get("rehearsal"), card.get("card")]


def lines_of(path: Path) -> list[Line]:
    """Return the findings in a file; a last line that was cut off is left out. Exits with 2 where it holds
    none.
    """
    try:
        texts = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        _refuse(f"{path} must be the results.jsonl of gpu_check.sh ({error})")
    lines: list[Line] = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            line["part"]
        except (ValueError, KeyError, TypeError):
            if number == len(texts):
                break
            _refuse(f"{path}:{number}: a JSON object with a part must stand on each line; got {text[:80]!r}")
        lines.append(line)
    if not lines:
        _refuse(f"{path} must hold findings of gpu_check.sh; it holds none")
    return lines


def _refuse(message: str) -> NoReturn:
    print(f"gpu_report: {message}", file=sys.stderr)
    raise SystemExit(2)


def files_in(paths: list[Path]) -> list[Path]:
    """Return the files of results; a folder stands for those of all its calls, in order."""
    return [
        file for path in paths for file in (sorted(path.glob("results*.jsonl")) if path.is_dir() else [path])
    ]


def figures(lines: list[Line]) -> dict[str, Any]:
    """Return what a report holds, by section."""

    def of(part: str, name: str | None = None) -> list[Line]:
        return [line for line in lines if line["part"] == part and name in (None, line.get("name"))]

    def one(part: str, name: str) -> Line:
        return _bare((of(part, name) or [{}])[-1])

    tests = [line for line in of("tests") if "outcome" in line]
    theirs = [line["step_s"] for line in of("peer", "step")]
    medians = {line["kind"]: _bare(line) for line in of("steps", "median")}
    ours = medians.get("graphs", {}).get("step_s")
    ratio = statistics.median(theirs[1:] or theirs) / ours if theirs and ours else None
    return {
        "code": one("machine", "code"),
        "card": one("machine", "card"),
        "versions": one("machine", "versions"),
        "speeds": one("machine", "speeds"),
        "tests": {
            outcome: [line["name"] for line in tests if line["outcome"] == outcome]
            for outcome in ("PASSED", "FAILED", "ERROR", "SKIPPED")
        },
        "agreement": {line["name"]: _bare(line) for line in of("agree") if "logprob_off_max" in line},
        "work": one("steps", "built"),
        "steps": medians,
        "peer": {
            "steps_s": theirs,
            "ratio": None if ratio is None else round(ratio, 2),
            **_peak(of("peer", "step")),
        },
        "operations": {
            line["name"]: _bare(line) for line in of("kernels") if "rc" not in line and "error" not in line
        },
        "demo": {line["name"]: _bare(line) for line in lines if line["part"] == "demo"},
        "kernels": {
            name: [_bare(line) for line in of("steps", name) if "kernel" in line]
            for name in ("kernels, learning", "kernels, sampling")
        },
        "errors": [_bare(line, "part") for line in lines if "error" in line],
        "ends": {line["part"]: _bare(line) for line in lines if line.get("name") == "end"},
    }


def _bare(line: Line, *more: str) -> Line:
    """Return a finding without the keys that say where it belongs."""
    return {key: value for key, value in line.items() if key in more or key not in ("part", "name", "at_s")}


def _peak(steps: list[Line]) -> Line:
    peaks = [line["peak_gb"] for line in steps if "peak_gb" in line]
    return {"peak_gb": max(peaks)} if peaks else {}


def name_of(found: dict[str, Any]) -> str:
    """Return DATE-CARD of a report."""
    card = found["card"].get("card", "no GPU")
    return f"{found['code'].get('date', 'undated')}-{re.sub(r'[^A-Za-z0-9]+', '-', card).strip('-')}"


def _stem(path: Path) -> str:
    return path.stem


def before(found: dict[str, Any], folder: Path) -> tuple[str, dict[str, Any]] | None:
    """Return the latest earlier report: of the same card where there is one."""
    reports = [(path.stem, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"), key=_stem)]
    reports = [one for one in reports if one[1]["code"].get("date", "") <= found["code"].get("date", "")]
    same = [report for report in reports if report[1]["card"].get("card") == found["card"].get("card")]
    return next(reversed(same or reports), None)


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    """Return a table, or nothing if there are no rows."""
    if not rows:
        return []
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def report(found: dict[str, Any], earlier: tuple[str, dict[str, Any]] | None) -> str:
    """Return the page."""
    code, card, versions = found["code"], found["card"], found["versions"]
    title = f"# {card.get('card', 'no GPU')}, {code.get('date', 'undated')}"
    if code.get("rehearsal"):
        title += " (a rehearsal on a CPU: its figures mean nothing)"
    lines = [
        title, "",
        f"`bash benchmarks/gpu_check.sh`, commit {code.get('commit', 'unknown')}; "
        "written by `benchmarks/gpu_report.py`.", "",
        "Versions: "
        + ", ".join(f"{name} {value}" for name, value in versions.items() if value not in ("-", None)) + ".",
        "",
    ]  # fmt: skip
    if speeds := found["speeds"]:
        lines += [
            f"Measured: {speeds['tflops']} TFLOP/s of bfloat16 products, "
            f"{speeds['tb_per_s']} TB/s of copies.",
            "",
        ]
    if earlier is not None:
        lines += [f"Compared with: [{earlier[0]}]({earlier[0]}.md).", ""]
    sections = (_parts, _tests, _agreement, _steps, _demo, _operations, _kernels, _errors)
    for section in sections:
        lines += section(found, earlier[1] if earlier is not None else None)
    return "\n".join(lines).rstrip() + "\n"


def _parts(found: dict[str, Any], _: dict[str, Any] | None) -> list[str]:
    rows = [
        [part, end.get("rc", end.get("skipped")), end.get("seconds")] for part, end in found["ends"].items()
    ]
    return ["## Parts", "", *table(["part", "exit code", "s"], rows)] if rows else []


def _tests(found: dict[str, Any], earlier: dict[str, Any] | None) -> list[str]:
    tests = found["tests"]
    counts = {outcome.lower(): len(names) for outcome, names in tests.items()}
    if not any(counts.values()):
        return []
    lines = [
        "## Tests",
        "",
        "`pytest -m gpu`: " + ", ".join(f"{n} {name}" for name, n in counts.items()) + ".",
        "",
    ]
    was = set() if earlier is None else {*earlier["tests"]["FAILED"], *earlier["tests"]["ERROR"]}
    for name in (*tests["FAILED"], *tests["ERROR"]):
        lines.append(f"- {name}" + (" (failed before)" if name in was else ""))
    return [*lines, ""] if lines[-1] else lines


def _agreement(found: dict[str, Any], earlier: dict[str, Any] | None) -> list[str]:
    keys = ("logprob_off_max", "logprob_off_mean", "gradient_off", "worst_cosine", "greedy_alike")
    rows = []
    for name, row in found["agreement"].items():
        rows.append([name, *(row.get(key) for key in keys)])
        if earlier is not None and name in earlier["agreement"]:
            rows.append([f"{name}, before", *(earlier["agreement"][name].get(key) for key in keys)])
    made = table(["precision", *(key.replace("_", " ") for key in keys)], rows)
    return ["## Agreement with float32 on the CPU", "", *made] if rows else []


def _steps(found: dict[str, Any], earlier: dict[str, Any] | None) -> list[str]:
    rows, then = [], {} if earlier is None else earlier["steps"]
    for kind, row in found["steps"].items():
        if kind.startswith("profile"):
            continue
        peaks = row.get("peaks_gb") or {}
        parts, was = row["parts_s"], then.get(kind, {}).get("step_s")
        rows.append([
            kind, row["step_s"], was, (row.get("floor_s") or {}).get("step"), row.get("times_the_floor"),
            parts.get("rollout/read prefixes"), parts.get("rollout/sample"), parts.get("learn"),
            max(peaks.values(), default=None), row.get("reserved_gb"), row.get("groups_in_a_pass"),
        ])  # fmt: skip
    head = [
        "kind",
        "step s",
        "before",
        "floor s",
        "times",
        "prefixes s",
        "sample s",
        "learn s",
        "peak GB",
        "reserved GB",
        "groups a pass",
    ]
    lines = ["## Steps", "", "Medians, seconds on the wall.", "", *table(head, rows)] if rows else []
    if found["peer"]["steps_s"]:
        peer = found["peer"]
        taken = ", ".join(f"{value:.3g}" for value in peer["steps_s"])
        lines += [
            f"TRL on the same work: {taken} s a step, peak {peer.get('peak_gb', '?')} GB; "
            f"ours is {peer['ratio']} times as fast.",
            "",
        ]
    return lines


def _demo(found: dict[str, Any], _: dict[str, Any] | None) -> list[str]:
    rows = [
        [name, row["updates"], row["wall_s"], (row.get("last") or {}).get("reward/total"),
         (row.get("metrics") or {}).get("metrics", {}).get("test/synthetic/iou")]
        for name, row in found["demo"].items() if "updates" in row
    ]  # fmt: skip
    return (
        ["## Demo", "", *table(["precision", "updates", "wall s", "last reward", "IoU"], rows)]
        if rows
        else []
    )


def _operations(found: dict[str, Any], earlier: dict[str, Any] | None) -> list[str]:
    then = {} if earlier is None else earlier["operations"]
    rows = []
    for name, row in found["operations"].items():
        rest = {key: value for key, value in row.items() if key not in ("ms", "forward_ms", "backward_ms")}
        said = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in rest.items())
        was = then.get(name, {})
        rows.append(
            [
                name,
                row.get("ms", row.get("forward_ms")),
                was.get("ms", was.get("forward_ms")),
                row.get("backward_ms"),
                said,
            ]
        )
    head = ["operation", "forward ms", "before", "backward ms", ""]
    return ["## Operations", "", *table(head, rows)] if rows else []


def _kernels(found: dict[str, Any], _: dict[str, Any] | None) -> list[str]:
    lines: list[str] = []
    for name, kernels in found["kernels"].items():
        rows = [[f"`{row['kernel'][:100]}`", row["ms"], row["times"]] for row in kernels[:KERNELS]]
        lines += [f"## {name.capitalize()}", "", *table(["kernel", "ms", "times"], rows)] if rows else []
    return lines


def _errors(found: dict[str, Any], _: dict[str, Any] | None) -> list[str]:
    lines = [f"- {row['part']}: {str(row['error'])[:300]}" for row in found["errors"]]
    return ["## Errors", "", *lines, ""] if lines else []


def sentence(folder: Path) -> str:
    """Return what the docs say of GPUs: the figures of the latest report, or that there is none."""
    paths = sorted(folder.glob("*.json"), key=_stem)
    if not paths:
        return NOT_YET
    name, found = paths[-1].stem, json.loads(paths[-1].read_text())
    step, peer = found["steps"].get("graphs"), found["peer"]
    said = [
        f"On one {found['card'].get('card', 'GPU')} "
        f"([report](benchmarks/gpu/{name}.md), {found['code'].get('date')}):"
    ]
    if step is not None:
        peak, work = max((step.get("peaks_gb") or {}).values(), default=None), found["work"]
        said.append(
            f"a step of {work['parameters'] / 1e9:.1f} billion weights "
            f"({work['prompts']} prompts of {work['side']}x{work['side']}, "
            f"{work['group']} completions of {work['tokens']} tokens) {step['step_s']:.2f} s, "
            f"{step.get('times_the_floor', '?')} times its floor, peak {peak} GB;"
        )
    if peer["ratio"] is not None:
        said.append(f"{peer['ratio']} times as fast as TRL 1.16;")
    tests = {outcome: len(names) for outcome, names in found["tests"].items()}
    if ran := tests["PASSED"] + tests["FAILED"] + tests["ERROR"]:
        said.append(f"{tests['PASSED']} of {ran} tests of a GPU pass.")
    return " ".join(said).rstrip(";")


def renewed(page: Path, folder: Path) -> str:
    """Return a page of the docs with its GPU figures updated."""
    text = page.read_text()
    first, last = text.find(BEGIN), text.find(END)
    if first < 0 or last < first:
        raise ValueError(f"{page}: a place for the figures must stand between {BEGIN!r} and {END!r}")
    said = sentence(folder)
    if page.parent.name == "docs":
        said = said.replace("(benchmarks/", "(../benchmarks/")
    return f"{text[: first + len(BEGIN)]}\n{said}\n{text[last:]}"


def main() -> int:
    """Write or print a report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", nargs="*", type=Path, help="results.jsonl of calls of gpu_check.sh, or their folder"
    )
    parser.add_argument("--print", action="store_true", help="print the report and write nothing")
    parser.add_argument(
        "--docs", action="store_true", help="renew README.md and docs/speed.md from the latest report"
    )
    parser.add_argument("--to", type=Path, default=FOLDER, help="folder of the reports")
    asked = parser.parse_args()
    if asked.results:
        if not (files := files_in(asked.results)):
            _refuse(f"{asked.results[0]} must hold the results.jsonl of gpu_check.sh")
        found = figures(read(files))
        page = report(found, before(found, asked.to))
        if asked.print:
            print(page)
            return 0
        if "card" not in found["card"] or found["code"].get("rehearsal"):
            print(
                "gpu_report: results must be a GPU's; these are of a rehearsal or name no card "
                "(--print prints them)",
                file=sys.stderr,
            )
            return 2
        asked.to.mkdir(parents=True, exist_ok=True)
        names = (f"{name_of(found)}{more}" for more in ("", *(f"-{i}" for i in range(2, 100))))
        path = next(path for path in (asked.to / f"{name}.md" for name in names) if not path.exists())
        path.write_text(page)
        path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        print(path)
    elif not asked.docs:
        parser.error("results.jsonl, or --docs, is needed")
    if asked.docs or asked.to == FOLDER:
        for doc in DOCS:
            doc.write_text(renewed(doc, asked.to))
    return 0


if __name__ == "__main__":
    sys.exit(main())
