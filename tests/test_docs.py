"""What the documents show works: their Python runs, their commands parse, their links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks(kind: str) -> Iterator[tuple[Path, int, str]]:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            if match.group(1) == kind:
                yield document, text.count("\n", 0, match.start()) + 2, match.group(2)


def _name(document: Path, line: int) -> str:
    return f"{document.relative_to(ROOT)}:{line}"


PYTHON_FILES = sorted({document for document, _, _ in _blocks("python")})
COMMANDS = [
    pytest.param(command, id=f"{_name(document, line)} {command[:60]}")
    for kind in ("sh", "bash", "console")
    for document, line, code in _blocks(kind)
    for command in (part.partition("#")[0].strip().removeprefix("$ ") for part in code.splitlines())
    if command.startswith("statescan ")
]


def test_the_documents_hold_what_these_tests_read() -> None:
    assert ROOT / "README.md" in PYTHON_FILES
    assert len(COMMANDS) >= 9


@pytest.mark.parametrize("document", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_python_of_a_document_runs(document: Path, tmp_path: Path) -> None:
    # The blocks of a document run one after another in one process, as a reader would paste them. The line numbers of a
    # traceback are the document's.
    parts, at = [], 1
    for found, line, code in _blocks("python"):
        if found == document:
            parts.append("\n" * (line - at) + code)
            at = line + code.count("\n")
    script = tmp_path / f"{document.stem}.py"
    script.write_text("".join(parts), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "STATESCAN_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, f"{document.relative_to(ROOT)}:\n{done.stderr}"


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_a_document_parses(line: str) -> None:
    import typer.main

    from statescan.cli.app import app

    arguments = shlex.split(line)[1:]
    group: Any = typer.main.get_command(app)
    context = group.make_context("statescan", list(arguments), resilient_parsing=False)
    name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    assert command is not None
    parsed = command.make_context(name, rest, parent=context)  # a usage error raises
    overrides = parsed.params.get("overrides") or []
    if name == "train":
        from statescan.models import preset
        from statescan.train import RunConfig

        RunConfig(preset(parsed.params["preset"])).apply_overrides(overrides)


def test_a_wrong_command_would_not_parse() -> None:
    with pytest.raises(Exception, match="No such option"):
        test_a_command_of_a_document_parses("statescan train --out x --no-such-option 3")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(document: Path) -> None:
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert missing == []


def test_the_file_tree_of_the_readme_is_the_trees() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme[readme.index("src/statescan/\n") :].partition("```")[0]
    rooms = {line.split()[0].strip("/") for line in tree.splitlines()[1:] if line.startswith("  ")}
    there = {path.parent.name for path in (ROOT / "src" / "statescan").glob("*/__init__.py")}
    assert rooms == there
