"""model_cards/moleblend-small: the released checkpoint as it lies there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import moleblend_hf
from moleblend_hf.verification import verify

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "model_cards" / "moleblend-small"
PACKAGE = Path(moleblend_hf.__file__).parent

LOAD = f"""
import sys
sys.modules["moleblend_hf"] = None  # as where it is not installed
import torch
from transformers import AutoModel, AutoProcessor
processor = AutoProcessor.from_pretrained({str(FOLDER)!r}, trust_remote_code=True)
model = AutoModel.from_pretrained({str(FOLDER)!r}, trust_remote_code=True)
assert model.dtype == torch.float32
with torch.no_grad():
    one, other = model(**processor(["OCC", "C(C)O"])).pooler_output
assert torch.allclose(one, other, atol=1e-5)
print(sum(parameter.numel() for parameter in model.parameters()))
"""


def test_it_loads_in_a_fresh_process_without_the_package(tmp_path):
    result = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert 9e6 < int(result.stdout) < 10.5e6


def test_it_computes_what_it_computed_when_it_was_released():
    report = verify(FOLDER)
    assert report.ok, report


def test_its_code_is_that_of_the_package():
    """After a change there: `cp` what differs, and look whether the reference outputs still hold."""
    copies = sorted(FOLDER.glob("*.py"))
    assert copies
    stale = [path.name for path in copies if path.read_bytes() != (PACKAGE / path.name).read_bytes()]
    assert stale == []


def test_it_is_small_safe_and_says_where_it_comes_from():
    assert (FOLDER / "model.safetensors").stat().st_size < 25e6
    endings = {path.suffix for path in FOLDER.iterdir() if path.name != "LICENSE"}
    assert endings <= {".json", ".jsonl", ".md", ".png", ".py", ".safetensors"}
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for needed in (
        "license: apache-2.0",
        "Licence: cc0-1.0",
        "Licence: mit",
        "Licence: cc-by-4.0",
        "## Evaluation",
        "## Limits",
    ):
        assert needed in card
    for path in (FOLDER / "README.md", FOLDER / "training_settings.json"):
        assert not re.search(r"(?<![\w.:/])/(home|root|work|tmp|Users)/", path.read_text(encoding="utf-8"))
    assert json.loads((FOLDER / "training_settings.json").read_text())["num_training"] > 100_000
