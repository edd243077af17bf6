"""Look every pinned release up in a database of known vulnerabilities, by pip-audit. Resolves and installs nothing.

Fails where one is known to be vulnerable. Passes, with a notice, where no database can be reached. A mirror of PyPI may
answer and know of no vulnerability at all: what counts is a database that knows of one that everybody knows.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

_ACCEPTED: Final[dict[str, str]] = {}
"""Vulnerabilities that don't concern us: the id, and why not."""

_KNOWN_TO_BE_VULNERABLE = "jinja2==2.10"
_ANSWER_WITHIN_S = 5
_FIND_WITHIN_S = 20.0
_AUDIT_WITHIN_S = 300.0


class AuditError(Exception):
    """pip-audit ended without a result; its last words."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Look pinned releases up in a database of known vulnerabilities.")
    parser.add_argument("lock", type=Path, help="requirements file in which every release is pinned")
    parser.add_argument("--osv-url", help="ask this database, which speaks OSV's protocol, instead of OSV and PyPI")
    arguments = parser.parse_args()
    metadata.version("pip-audit")  # that it is missing must not look like a database out of reach
    databases = [["osv"], ["pypi"]] if arguments.osv_url is None else [["osv", "--osv-url", arguments.osv_url]]
    reasons = []
    for database in databases:
        reason = _why_not(database)
        if not reason:
            return _report(database[0], _audit(arguments.lock, database, _AUDIT_WITHIN_S))
        reasons.append(f"{database[0]}: {reason}")
    print(f"NOTICE: {arguments.lock} was NOT audited: no database can be reached ({'; '.join(reasons)})")
    return 0


def _why_not(database: Sequence[str]) -> str:
    """Empty, or why this database can't be relied upon from here."""
    with tempfile.TemporaryDirectory() as folder:
        known = Path(folder, "requirements.txt")
        known.write_text(_KNOWN_TO_BE_VULNERABLE)
        try:
            found = _audit(known, database, _FIND_WITHIN_S)
        except AuditError as error:
            return str(error)
    return "" if any(release.get("vulns") for release in found) else "answers, but knows of no vulnerabilities"


def _audit(requirements: Path, database: Sequence[str], within_s: float) -> list[dict[str, Any]]:
    """What is known of each release. Raises AuditError."""
    flags = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--timeout", str(_ANSWER_WITHIN_S)]
    flags += [word for accepted in _ACCEPTED for word in ("--ignore-vuln", accepted)]
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(requirements), "--format", "json", *flags]
    command += ["--vulnerability-service", *database]
    try:
        audit = subprocess.run(command, capture_output=True, text=True, timeout=within_s, check=False)
        return list(json.loads(audit.stdout)["dependencies"])
    except subprocess.TimeoutExpired:
        raise AuditError(f"no result within {within_s:g} s") from None
    except json.JSONDecodeError:
        raise AuditError((audit.stderr.strip().splitlines() or ["ended without a word"])[-1]) from None


def _report(database: str, releases: Sequence[dict[str, Any]]) -> int:
    vulnerabilities = 0
    for release in releases:
        if "skip_reason" in release:
            print(f"NOTICE: {release['skip_reason']}")
        for vulnerability in release.get("vulns", []):
            vulnerabilities += 1
            names = ", ".join([vulnerability["id"], *vulnerability["aliases"]])
            fixed = ", ".join(vulnerability["fix_versions"]) or "no release"
            print(f"VULNERABLE: {release['name']} {release['version']}: {names}; fixed in {fixed}")
    print(f"{len(releases)} releases audited by {database}: {vulnerabilities} known vulnerabilities")
    return 1 if vulnerabilities else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AuditError as error:
        sys.exit(f"pip-audit failed: {error}")
