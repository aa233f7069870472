"""The scripts in examples/ run as they stand, offline, and do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_quickstart_runs_and_its_model_has_learned(tmp_path):
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "left out: molecule 1, which could not be parsed by RDKit" in result.stdout
    assert "is the model that was saved" in result.stdout
    losses = [float(loss) for loss in re.findall(r"seed \d: loss ([\d.]+)", result.stdout)]
    assert len(losses) == 2
    assert max(losses) < 0.6  # 1 is the loss of the mean
    assert len(re.findall(r"-?[\d.]+ ± [\d.]+ +\(RDKit: -?[\d.]+\)", result.stdout)) == 4
