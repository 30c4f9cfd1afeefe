"""The licences of the pinned packages as a Markdown table: `python tools/licences.py`.

Exits with 1 where one is neither permissive nor known to go with MIT. Packages that are pinned but
not installed are listed as such.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

PINS = Path(__file__).parents[1] / "constraints.txt"
PERMISSIVE = re.compile(r"MIT|BSD|Apache|ISC|PSF|Python Software|HPND|Zlib|CC0|BSL|CNRI|0BSD", re.I)
# Copyleft by file: it asks for changes to those files themselves, and leaves what uses them alone.
BY_FILE = re.compile(r"MPL|Mozilla", re.I)
COPYLEFT = re.compile(r"\b[AL]?GPL|General Public|EUPL|SSPL|Commons Clause", re.I)


def licence(name: str) -> str | None:
    """What a package says of its licence; None if it is not installed."""
    try:
        told = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    classifiers = [c.split(" :: ")[-1] for c in told.get_all("Classifier") or [] if "License" in c]
    named = "; ".join(c for c in classifiers if c != "OSI Approved")
    first = (told.get("License") or "").strip().splitlines()[:1]
    return told.get("License-Expression") or named or " ".join(first) or "unknown"


def verdict(text: str | None) -> str:
    """`permissive`, `by file`, `not installed` or `look at it`."""
    if text is None:
        return "not installed"
    if COPYLEFT.search(text):
        return "look at it"
    if BY_FILE.search(text):
        return "by file"
    return "permissive" if PERMISSIVE.search(text) else "look at it"


def main() -> int:
    """Print the table; returns the exit code."""
    pins = [line.split("==") for line in PINS.read_text().splitlines() if "==" in line]
    rows = [(name, version, licence(name)) for name, version in pins]
    print("| package | version | licence | |\n|---|---|---|---|")
    for name, version, text in rows:
        print(f"| {name} | {version} | {text or ''} | {verdict(text)} |")
    return int(any(verdict(text) == "look at it" for *_, text in rows))


if __name__ == "__main__":
    sys.exit(main())
