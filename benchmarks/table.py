"""Prints result files of `statescan bench` as Markdown tables: python benchmarks/table.py benchmarks/results/*.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_WHOLE_MODELS = ("train", "prefill", "decode", "generate", "block")


def cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def milliseconds(value: float | None) -> str:
    return cell(value, 2 if value is None or value >= 1 else 4)


def facts(machine: dict[str, Any]) -> str:
    torch = f"torch {machine['versions']['torch']}, {machine['date']}"
    if machine.get("device") == "cuda":
        return f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}, {torch}"
    threads = f"{machine['threads']} threads, kernels {machine['cpu_kernels']}"
    return f"{machine['cpu']} ({machine['cpu_family_model']}), {threads}, {torch}"


def has_rows(report: dict[str, Any]) -> bool:
    """Whether it holds rows of ops and models; other results have tables of their own."""
    return "ceilings" in report and all("bench" in row for row in report["rows"])


def main(files: list[str]) -> None:
    for file in files:
        report = json.loads(Path(file).read_text())
        if not has_rows(report):
            continue
        ceilings = ", ".join(f"{name} {value:.4g}" for name, value in report["ceilings"].items())
        print(f"**{Path(file).stem}**: {facts(report['machine'])}; ceilings {ceilings}\n")
        print("| case | implementation | dtype | ms, median (best) | tokens/s | x floor | error | peak GB |")
        print("|---|---|---|---|---|---|---|---|")
        for row in report["rows"]:
            if row["failure"]:
                print(f"| {row['case']} | {row['implementation']} | {row['dtype']} | {row['failure']} | | | | |")
                continue
            error = "" if row["relative_error"] is None else f"{row['relative_error']:.1e}"
            peak = row["peak_memory_bytes"] if row["bench"] in _WHOLE_MODELS else None
            time = f"{milliseconds(row['milliseconds'])} ({milliseconds(row['best'])})"
            columns = [row["case"], row["implementation"], row["dtype"], time, cell(row["tokens_per_second"], 1)]
            print("| " + " | ".join([*columns, cell(row["ratio"], 2), error, cell(peak and peak / 1e9, 2)]) + " |")
        print()


if __name__ == "__main__":
    main(sys.argv[1:])
