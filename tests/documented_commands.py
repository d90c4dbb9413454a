"""The commands of docs/operations.md, for the tests that run them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

OPERATIONS = Path(__file__).resolve().parents[1] / "docs" / "operations.md"


def documented_sections() -> list[str]:
    """Returns the headings of the sections that have commands."""
    sections = re.findall(r"^## (.*?)$(.*?)(?=^## |\Z)", OPERATIONS.read_text(), re.MULTILINE | re.DOTALL)
    return [heading for heading, body in sections if "```bash\n" in body]


def documented_commands(section: str) -> list[str]:
    """Returns the commands of a section of docs/operations.md, without their comments, runs of spaces made one."""
    text = OPERATIONS.read_text()
    (body,) = re.findall(rf"^## {section}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^```bash\n(.*?)^```", body, re.MULTILINE | re.DOTALL)
    lines = [re.sub(r"\s+# .*", "", line) for block in blocks for line in block.splitlines()]
    return [re.sub(r" +", " ", line) for line in lines if line]


def documented(section: str, command: str, **replaced: str) -> list[str]:
    """Returns the words of `command`, which docs/operations.md must have in this section, to be run by a test.

    Args:
      section: The section's heading.
      command: The command as it stands there.
      replaced: What a test needs other than it stands there, as `old=new`; each is in the command.
    """
    assert command in documented_commands(section), f"docs/operations.md, {section}, has no such command: {command}"
    for old, new in replaced.items():
        assert old in command
        command = command.replace(old, new)
    return shlex.split(command)
