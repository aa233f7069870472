"""Every Python snippet and every `moleblend` line of README.md runs as it stands.

They run in a folder that has what a reader of README would have:

- `model_cards`, as it is.
- `outputs/pretrain`, a pretraining checkpoint, and `outputs/finetune`, a fine-tuned one for regression with the target "pIC50",
  calibrated; each with processor, card and reference outputs. Both are tiny.
- `molecules.csv` with the columns smiles and pIC50, and `molecules.sdf` with geometries.

Python snippets run in their order, in one process that has what the snippets before left, as in a notebook. Of fences of a
shell, lines run that call `moleblend`, also in a pipe. What needs something else has a comment right before its fence:

    <!-- not run: reason -->
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom
from tiny import CARD_METADATA, SMILES, tiny_config
from transformers.utils import logging
from typer.testing import CliRunner

from moleblend_hf import (
    MoleBlendForPreTraining,
    MoleBlendForSequenceClassification,
    MoleBlendPipeline,
    MoleBlendProcessor,
)
from moleblend_hf.cli import app
from moleblend_hf.verification import write_reference_outputs

README = Path(__file__).parent.parent / "README.md"
FENCE = re.compile(
    r"(?P<mark><!-- *not run:(?P<reason>[^\n]*)-->\n+)?^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
SHELLS = ("bash", "sh", "shell", "console")
CALLS = re.compile(r"(?:^|[|;&]\s*)moleblend\s")  # at the start of a line or after an operator
OPERATORS = re.compile(r"[|<>;&]")


class Snippet(NamedTuple):
    """A fence that is to run."""

    line: int  # of its first line of text, from 1
    language: str
    text: str


def snippets(text: str) -> list[Snippet]:
    """Fences of a document that are not marked."""
    found = []
    for match in FENCE.finditer(text):
        if match["mark"] is None:
            found.append(Snippet(text.count("\n", 0, match.start("text")) + 1, match["language"], match["text"]))
        elif not match["reason"].strip():
            raise ValueError("A fence is marked as not run without a reason.")
    marks = len(re.findall(r"<!-- *not run", text))
    if marks != len([match for match in FENCE.finditer(text) if match["mark"]]):
        raise ValueError("A mark `<!-- not run: reason -->` does not stand right before a fence.")
    return found


def commands(text: str) -> list[str]:
    """Lines of a shell that call `moleblend`, those that go on after a backslash joined."""
    lines = [
        line.strip().removeprefix("$ ")
        for snippet in snippets(text)
        if snippet.language in SHELLS
        for line in snippet.text.replace("\\\n", " ").splitlines()
    ]
    return [line for line in lines if CALLS.search(line)]


def save(model, folder: Path) -> None:
    processor = MoleBlendProcessor()
    if isinstance(model, MoleBlendForPreTraining):
        model.eval().save_pretrained(folder)
        processor.save_pretrained(folder)
    else:  # as finetune.py does: with the pipeline
        MoleBlendPipeline(model=model.eval(), feature_extractor=processor, device="cpu").save_pretrained(folder)
    write_reference_outputs(model, processor, folder)
    (folder / "README.md").write_text(CARD_METADATA)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of a reader."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "model_cards").symlink_to(README.parent / "model_cards")
    save(MoleBlendForPreTraining(tiny_config()), folder / "outputs" / "pretrain")
    target = {"id2label": {0: "pIC50"}, "label2id": {"pIC50": 0}, "problem_type": "regression"}
    calibration = {"conformal_coverage": 0.9, "conformal_quantiles": [0.5]}
    save(MoleBlendForSequenceClassification(tiny_config(**target, **calibration)), folder / "outputs" / "finetune")
    rows = [f"{smiles},{5 + index}" for index, smiles in enumerate(SMILES)]
    (folder / "molecules.csv").write_text("\n".join(["smiles,pIC50", *rows]) + "\n")
    with Chem.SDWriter(str(folder / "molecules.sdf")) as writer:
        for smiles in SMILES:
            molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
            rdDistGeom.EmbedMolecule(molecule, randomSeed=1)
            writer.write(molecule)
    return folder


@pytest.fixture(autouse=True)
def logging_as_before():
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def run_python(found: list[Snippet], folder: Path) -> subprocess.CompletedProcess:
    """Snippets in one process; a traceback names the line of README."""
    lines = ["names = {'__name__': 'snippet'}"]
    lines += [
        f"exec(compile({chr(10) * (snippet.line - 1) + snippet.text!r}, 'README.md', 'exec'), names)"
        for snippet in found
    ]
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=folder, check=False
    )


def run_command(command: str, folder: Path, monkeypatch) -> tuple[int, str]:
    """Exit code and output of a line; by a shell only if it needs one, since a process takes seconds to start."""
    if not OPERATORS.search(command):
        monkeypatch.chdir(folder)
        result = CliRunner().invoke(app, command.split()[1:])
        return result.exit_code, result.output + repr(result.exception)
    (folder / "bin").mkdir(exist_ok=True)
    script = folder / "bin" / "moleblend"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m moleblend_hf.cli "$@"\n')
    script.chmod(0o755)
    environment = os.environ | {"PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


def test_the_python_snippets_run(place):
    found = [snippet for snippet in snippets(README.read_text(encoding="utf-8")) if snippet.language == "python"]
    assert found
    result = run_python(found, place)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("command", commands(README.read_text(encoding="utf-8")))
def test_the_commands_run(command, place, monkeypatch):
    code, output = run_command(command, place, monkeypatch)
    assert code == 0, output[-3000:]


# The tests above notice


DOCUMENT = """
```python
first = 1
```

<!-- not run: needs a GPU -->
```python
raise SystemExit
```

```bash
pip install x && moleblend info outputs/finetune
moleblend embed outputs/pretrain \\
    molecules.csv -o embeddings.csv
python training/predict.py --input moleblend
head -3 molecules.csv | moleblend predict outputs/finetune --format csv > out.csv
```

<!-- not run: needs the Hub -->

```bash
moleblend info user/name
```

```python
print(first)
import nothing_of_this_name
```
"""


def test_marked_fences_are_left_out_and_lines_are_joined(place, monkeypatch):
    found = snippets(DOCUMENT)
    assert [(snippet.line, snippet.language) for snippet in found] == [(3, "python"), (12, "bash"), (26, "python")]
    assert [re.sub(" +", " ", command) for command in commands(DOCUMENT)] == [
        "pip install x && moleblend info outputs/finetune",
        "moleblend embed outputs/pretrain molecules.csv -o embeddings.csv",
        "head -3 molecules.csv | moleblend predict outputs/finetune --format csv > out.csv",
    ]
    result = run_python([snippet for snippet in found if snippet.language == "python"], place)
    assert result.stdout == "1\n"
    assert 'File "README.md", line 27' in result.stderr
    assert run_command(commands(DOCUMENT)[1], place, monkeypatch)[0] == 0
    assert run_command("moleblend embed outputs/finetune molecules.xyz", place, monkeypatch)[0] == 1
    code, output = run_command(commands(DOCUMENT)[2], place, monkeypatch)
    assert code == 0, output
    assert len((place / "out.csv").read_text().splitlines()) == 3


def test_marks_without_reason_or_fence_are_refused():
    with pytest.raises(ValueError, match="without a reason"):
        snippets("<!-- not run: -->\n```python\n```\n")
    with pytest.raises(ValueError, match="does not stand right before a fence"):
        snippets("<!-- not run: no time -->\nText.\n```python\n```\n")
