"""The documents this package implements, where they are at hand: their Python blocks and expected outputs.

They are looked for in ``PGQRS_SEEDS``, else in ``../shared/seeds`` beside the project's directory.
"""

from __future__ import annotations

import ast
import os
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: What the first line of a Python block may look like where nothing else marks it.
BEGINS = re.compile(r"(import |from \w|@\w|async def |def |# (Good|Create workflow)|step = |ctx = )")

FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def directory() -> Path | None:
    """Return where the documents are, None where they are not."""
    path = Path(os.environ.get("PGQRS_SEEDS") or ROOT.parent / "shared" / "seeds")
    return path if path.is_dir() else None


def document(title: str, *, containing: str) -> str | None:
    """Return the document with this heading and text, None where it is not at hand."""
    folder = directory()
    if folder is None:
        return None
    found = [p.read_text("utf-8") for p in sorted(folder.iterdir())]
    found = [text for text in found if re.search(rf"^#? ?{re.escape(title)}$", text, re.MULTILINE)]
    return next((text for text in found if containing in text), None)


def python_blocks(text: str) -> list[str]:
    """Return the Python blocks of a document, in order: fenced ones, else whatever parses as a program."""
    fenced = [textwrap.dedent(match[3]) for match in FENCED.finditer(text) if match[2] == "python"]
    if fenced:
        return fenced
    blocks, lines, position = [], text.splitlines(), 0
    while position < len(lines):
        end = block_end(lines, position) if BEGINS.match(lines[position]) else position
        if end > position:
            blocks.append("\n".join(lines[position:end]).strip() + "\n")
        position = max(end, position + 1)
    return blocks


def block_end(lines: list[str], begin: int) -> int:
    """Return the end of the longest program that begins at a line; its beginning where there is none."""
    best = begin
    for end in range(begin + 1, len(lines) + 1):
        if end - best > 60:
            break
        if is_program("\n".join(lines[begin:end])):
            best = end
    return best


def is_program(text: str) -> bool:
    """Whether a text is Python, in a coroutine; a heading of one word is not."""
    try:
        tree = ast.parse("async def block():\n" + textwrap.indent(text, "    ") + "\n    pass\n")
    except SyntaxError:
        return False
    function = tree.body[0]
    assert isinstance(function, ast.AsyncFunctionDef)
    return not any(isinstance(node, ast.Expr) and isinstance(node.value, ast.Name) for node in function.body)


def expected_outputs(text: str) -> list[str]:
    """Return what the document's programs are to print, in order, without its remarks."""
    outputs = []
    for chunk in text.split("Expected Output\n")[1:]:
        lines = chunk.replace("```", "").strip("\n").splitlines()
        block: list[str] = []
        for line in lines:
            if line.startswith(("#", "Crash Recovery", "Notice", "Best")):
                break
            block.append(re.sub(r" +# .*$", "", line))
        outputs.append("\n".join(block).strip())
    return outputs


def ported(block: str, dsn: str) -> str:
    """Return a block with this package in place of the original, and a database that exists."""
    block = re.sub(r"(?<=import )pgqrs\b|(?<=from )pgqrs\b|\bpgqrs(?=\.\w)", "pgqrs_celery", block)
    return re.sub(r"postgresql://[^\"]*", dsn, block)


def matches(output: str, expected: str) -> bool:
    """Whether an output is the expected one; ``[...]`` stands for any list."""
    pattern = re.escape(expected).replace(re.escape("[...]"), r"\[.*\]")
    return re.fullmatch(pattern, output.strip()) is not None
