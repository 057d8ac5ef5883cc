"""Prints result files of `statescan bench` as Markdown tables: python benchmarks/table.py benchmarks/results/*.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def main(files: list[str]) -> None:
    for file in files:
        report = json.loads(Path(file).read_text())
        if "ceilings" not in report:
            continue
        machine = report["machine"]
        print(
            f"**{Path(file).stem}**: {machine['cpu']} ({machine['cpu_family_model']}), {machine['threads']} threads, ",
            end="",
        )
        print(
            f"torch {machine['versions']['torch']}, kernels {machine['cpu_kernels']}, {machine['date']}; ceilings ",
            end="",
        )
        print(", ".join(f"{name} {value:.3g}" for name, value in report["ceilings"].items()) + "\n")
        print("| case | implementation | dtype | ms, median (best) | tokens/s | x floor | error | peak GB |")
        print("|---|---|---|---|---|---|---|---|")
        for row in report["rows"]:
            if row["failure"]:
                print(f"| {row['case']} | {row['implementation']} | {row['dtype']} | {row['failure']} | | | | |")
                continue
            error = "" if row["relative_error"] is None else f"{row['relative_error']:.1e}"
            peak = cell(row["peak_memory_bytes"] / 1e9, 2) if row["bench"] in ("train", "prefill", "decode") else ""
            time = f"{cell(row['milliseconds'], 2)} ({cell(row['best'], 2)})"
            columns = [row["case"], row["implementation"], row["dtype"], time, cell(row["tokens_per_second"], 1)]
            print("| " + " | ".join([*columns, cell(row["ratio"], 2), error, peak]) + " |")
        print()


if __name__ == "__main__":
    main(sys.argv[1:])
