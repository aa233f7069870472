"""The flat files of moleblend_hf/ can travel to the Hub and load there: import rules, and real loads without the package."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import SMILES, tiny_config

import moleblend_hf
from moleblend_hf import (
    MoleBlendEnsembleConfig,
    MoleBlendEnsembleForSequenceClassification,
    MoleBlendForPreTraining,
    MoleBlendForSequenceClassification,
    MoleBlendForTokenClassification,
    MoleBlendModel,
    MoleBlendProcessor,
)

PACKAGE = Path(moleblend_hf.__file__).parent
HUB_FILES = sorted(PACKAGE.glob("*_moleblend*.py"))
# The loader asks for every third-party import of the modeling file and of what it imports.
MODELING_IMPORTS = {"torch", "transformers", *sys.stdlib_module_names}
MODELING_PREFIXES = ("modeling_", "blending_", "eval_mode_", "heads_", "relations_", "rows_", "targets_")
MODELING_SIBLINGS = {
    *(
        "configuration_moleblend",
        "blending_moleblend",
        "eval_mode_moleblend",
        "heads_moleblend",
        "relations_moleblend",
    ),
    *("rows_moleblend", "targets_moleblend", "modeling_moleblend"),
}
LOOKS_RELATIVE = re.compile(r"^\s*from\s+\.(\S+)\s+import", re.MULTILINE)


def hub_file_violations(path: Path) -> list[str]:
    """Import rules for a file that the Hub loader copies and loads; empty if it can."""
    source, stem = path.read_text(encoding="utf-8"), path.stem
    siblings, found = set(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            if node.level > 1 or node.module is None or "." in node.module:
                found.append(f"line {node.lineno}: only `from .sibling import name` is copied")
            else:
                siblings.add(node.module)
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            root = name.split(".")[0]
            if root == path.parent.name:
                found.append(f"line {node.lineno}: absolute import of this package")
            elif name == "__future__" and stem.startswith(("modeling_", "configuration_")):
                found.append(f"line {node.lineno}: `from __future__` breaks the detection of configs")
            elif stem.startswith(MODELING_PREFIXES) and root not in MODELING_IMPORTS:
                found.append(f"line {node.lineno}: modeling may not import {name!r}")
    if stem.startswith("modeling_") and siblings - MODELING_SIBLINGS:
        found.append(f"modeling imports {sorted(siblings - MODELING_SIBLINGS)}")
    # The loader reads text, so a line of a docstring counts as an import.
    found += [f"text looks like an import of {name}" for name in set(LOOKS_RELATIVE.findall(source)) - siblings]
    return found


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.name)
def test_hub_files_obey_the_import_rules(path):
    assert hub_file_violations(path) == []


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("processing_a.py", "from . import b", "only `from .sibling import name`"),
        ("processing_a.py", "from .b.c import d", "only `from .sibling import name`"),
        ("processing_a.py", "from .. import b", "only `from .sibling import name`"),
        ("processing_a.py", "from package.b import c", "absolute import"),
        ("modeling_a.py", "def f():\n    import rdkit", "may not import 'rdkit'"),
        ("configuration_a.py", "from __future__ import annotations", "breaks the detection"),
        ("modeling_a.py", "from .processing_a import b", "modeling imports"),
        ("processing_a.py", '"""\nfrom .b import c\n"""', "looks like an import"),
    ],
)
def test_the_import_rules_notice_a_planted_violation(tmp_path, name, source, found):
    (tmp_path / "package").mkdir()
    path = tmp_path / "package" / name
    path.write_text(source)
    assert any(found in violation for violation in hub_file_violations(path))


def files_reached(*stems: str) -> set[str]:
    """Names of the hub files that these import, directly or not, and their own: what a folder has to carry."""
    reached: set[str] = set()
    waiting = {*stems}
    while waiting:
        stem = waiting.pop()
        reached.add(f"{stem}.py")
        siblings = set(LOOKS_RELATIVE.findall((PACKAGE / f"{stem}.py").read_text(encoding="utf-8")))
        waiting |= {sibling for sibling in siblings if f"{sibling}.py" not in reached}
    return reached


def in_fresh_process(code: str, tmp_path: Path) -> str:
    """Output of `code` in a process that does not find the package."""
    blocker = "import sys; sys.modules['moleblend_hf'] = None\n"
    result = subprocess.run(
        [sys.executable, "-c", blocker + code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pretraining model and processor."""
    path = tmp_path_factory.mktemp("saved")
    MoleBlendForPreTraining(tiny_config()).save_pretrained(path)
    MoleBlendProcessor(max_atoms=77).save_pretrained(path)
    return path


def test_a_saved_folder_holds_its_code_and_the_whole_auto_map(folder):
    names = {path.name for path in folder.iterdir()}
    code = files_reached("modeling_moleblend", "processing_moleblend")
    assert {"heads_moleblend.py", "targets_moleblend.py", "configuration_moleblend.py", "graphs_moleblend.py"} <= code
    assert {"config.json", "model.safetensors", "preprocessor_config.json", *code} <= names
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForPreTraining",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoProcessor",
        "AutoFeatureExtractor",
    }
    processor_map = json.loads((folder / "preprocessor_config.json").read_text())["auto_map"]
    assert set(processor_map) == {"AutoProcessor", "AutoFeatureExtractor"}


LOAD = """
import json, torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoProcessor
import transformers
for auto, folder, again in {loads!r}:
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert processor.to_dict() == extractor.to_dict(), (processor, extractor)
    assert processor.max_atoms == 77
    inputs = processor({smiles!r}, return_tensors="pt")
    draws = {{"generator": torch.Generator().manual_seed(0)}} if "PreTraining" in auto else {{}}
    with torch.no_grad():
        outputs = model(**inputs, **draws)
    first = outputs.loss if outputs.get("loss") is not None else outputs[0]
    model.save_pretrained(again)
    processor.save_pretrained(again)
    print(json.dumps([type(model).__name__, type(config).__name__, first.flatten().tolist()]))
"""


def test_saved_folders_load_without_the_package_and_save_again(tmp_path):
    """What was saved without the package loads without it, too."""
    classes = {
        MoleBlendModel: "AutoModel",
        MoleBlendForPreTraining: "AutoModelForPreTraining",
        MoleBlendForSequenceClassification: "AutoModelForSequenceClassification",
        MoleBlendForTokenClassification: "AutoModelForTokenClassification",
        MoleBlendEnsembleForSequenceClassification: "AutoModelForSequenceClassification",
    }
    expected = []
    for model_class in classes:
        config = tiny_config()
        if model_class not in (MoleBlendModel, MoleBlendForPreTraining):
            transforms = ["signed_log10", "none"]
            scales = {"target_means": [0.4, -3.0], "target_scales": [0.2, 2.0], "target_transforms": transforms}
            config = tiny_config(num_labels=2, problem_type="regression", **scales)
        if model_class is MoleBlendEnsembleForSequenceClassification:
            config = MoleBlendEnsembleConfig(**{**config.to_diff_dict(), "auto_map": None, "num_members": 2})
        model = model_class(config).eval()
        model.save_pretrained(tmp_path / "0" / model_class.__name__)
        MoleBlendProcessor(max_atoms=77).save_pretrained(tmp_path / "0" / model_class.__name__)
        draws = {"generator": torch.Generator().manual_seed(0)} if model_class is MoleBlendForPreTraining else {}
        with torch.no_grad():
            outputs = model(**MoleBlendProcessor()(SMILES), **draws)
        first = outputs.loss if outputs.get("loss") is not None else outputs[0]
        expected.append((model_class.__name__, type(config).__name__, first.flatten().tolist()))
    for time in (0, 1):
        loads = [
            (auto, *(str(tmp_path / str(number) / model_class.__name__) for number in (time, time + 1)))
            for model_class, auto in classes.items()
        ]
        found = in_fresh_process(LOAD.format(loads=loads, smiles=SMILES), tmp_path).splitlines()[-len(classes) :]
        for line, (model_name, config_name, values) in zip(map(json.loads, found), expected, strict=True):
            assert line[:2] == [model_name, config_name]
            assert line[2] == pytest.approx(values, abs=1e-6)
    assert (tmp_path / "2" / "MoleBlendModel" / "processing_moleblend.py").exists()


def test_every_auto_model_loads_from_a_pretraining_folder(tmp_path, folder):
    """A checkpoint to fine-tune from: the head is new and said to be, the encoder is not."""
    code = f"""
import json, torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification
base = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
    model, report = auto.from_pretrained(
        {str(folder)!r}, trust_remote_code=True, num_labels=3, output_loading_info=True)
    assert torch.equal(base.graph_token, model.moleblend.graph_token)
    print(json.dumps([model.config.num_labels, sorted(report["missing_keys"])]))
"""
    for line in in_fresh_process(code, tmp_path).splitlines()[-2:]:
        num_labels, missing = json.loads(line)
        assert num_labels == 3
        assert missing
        assert all(name.startswith("classifier.") for name in missing)
