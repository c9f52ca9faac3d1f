"""Checks the house rules that no compiler knows: files stay short, unsafe stays behind its walls."""

import re
import subprocess
import sys
from pathlib import Path

import verdict

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 500
UNSAFE = re.compile(r"^\s*(?!//)[^\"]*\bunsafe\s*(\{|fn|impl|extern)")


def sources() -> list[Path]:
    out = subprocess.run(["git", "ls-files", "-z", "*.rs"], cwd=ROOT, check=True, capture_output=True, text=True)
    return [ROOT / name for name in out.stdout.split("\0") if name and (ROOT / name).exists()]


def is_test(path: Path) -> bool:
    return path.stem == "tests" or "tests" in path.parts or "benches" in path.parts


def code_lines(text: str) -> int:
    """Lines before the unit tests at the end of the file."""
    head = re.split(r"^#\[cfg\(test\)\]\nmod tests? \{", text, maxsplit=1, flags=re.M)[0]
    return head.count("\n")


def main() -> int:
    faults, files = [], sources()
    for path in files:
        name, text = path.relative_to(ROOT), path.read_text()
        if not is_test(path) and code_lines(text) > MAX_LINES:
            faults.append(f"{name} has {code_lines(text)} lines without its tests, at most {MAX_LINES}")
        walled = path.name == "sys.rs" or name.parts[0] == "vmm" or is_test(path)
        if not walled and any(UNSAFE.match(line) for line in text.splitlines()):
            faults.append(f"{name} holds unsafe code, which belongs into vmm or a sys.rs")
    return verdict.close("house", faults, f"{len(files)} files keep the rules")


if __name__ == "__main__":
    sys.exit(main())
