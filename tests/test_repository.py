"""Facts that stand in two places of the repository and would go stale in one of them."""

import os
import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import moleblend_hf

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "training/sample/README.md")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("requirement", [*chain(PROJECT["dependencies"], *EXTRAS.values())])
def test_every_requirement_is_pinned_within_its_range(requirement):
    parsed = Requirement(requirement)
    if parsed.name == PROJECT["name"]:
        assert parsed.extras <= EXTRAS.keys()
        return
    pinned = {canonicalize_name(name): version for name, version in pins().items()}
    assert parsed.specifier.contains(pinned[canonicalize_name(parsed.name)])


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert moleblend_hf.__version__ == PROJECT["version"] == citation["version"]


def test_the_space_runs_with_the_pinned_gradio():
    front_matter = yaml.safe_load((ROOT / "examples" / "space" / "README.md").read_text().split("---")[1])
    assert front_matter["sdk_version"] == pins()["gradio"]


def test_linters_of_pre_commit_are_the_pinned_ones():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert hooks[0]["rev"] == f"v{pins()['ruff']}"


def test_readme_opens_with_the_two_commands_and_ci_installs_with_the_second():
    first_screen = (ROOT / "README.md").read_text().split("\n## ")[0]
    install = "pip install -e '.[dev]' -c constraints.txt"
    assert "pip install -e '.[train]' -c constraints.txt && accelerate launch training/pretrain.py\n" in first_screen
    assert f"{install} && pytest\n" in first_screen
    ci = ROOT / ".ci" / "run"
    assert install.removeprefix("pip install ") in ci.read_text()
    assert os.access(ci, os.X_OK)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_named_in_documents_exist(document):
    text = (ROOT / document).read_text()
    paths = set(re.findall(r"\b((?:training|benchmarks|model_cards|tests|moleblend_hf)/[\w./-]*\w)", text))
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", text)
    assert [link for link in links if not ((ROOT / document).parent / link).exists()] == []
