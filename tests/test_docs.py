"""Pages that are generated agree with what they are generated from."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_performance_page_shows_the_committed_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
