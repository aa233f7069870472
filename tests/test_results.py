"""Each command in RESULTS.md names a script that is there, and flags and recipes that it takes; test_probes.py runs the scripts."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / folder) for folder in ("training", "benchmarks")]
# Benchmarks that give flags which are not theirs to another script.
PASSED_ON = {"moleculenet": "finetune", "learning_curves": "finetune", "ablations": "pretrain"}
FENCE = re.compile(r"^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Those of fences, without comments, lines that go on after a backslash joined."""
    text = "".join(FENCE.findall((ROOT / "RESULTS.md").read_text(encoding="utf-8"))).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def flags_of():
    """The flags that --help of a script names."""
    known: dict[str, set[str]] = {}

    def flags(name: str, capsys) -> set[str]:
        if name not in known:
            with pytest.raises(SystemExit, match="0"):
                importlib.import_module(name).main(["--help"])
            known[name] = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        return known[name]

    return flags


@pytest.mark.parametrize("command", commands())
def test_a_command_names_what_is_there(command, flags_of, capsys):
    words = shlex.split(command, comments=True)
    (at,) = [index for index, word in enumerate(words) if word.endswith(".py")]
    assert words[0] in ("python", "accelerate")
    script = ROOT / words[at]
    assert script.is_file(), script
    taken = flags_of(script.stem, capsys)
    if script.stem in PASSED_ON:
        taken = taken | flags_of(PASSED_ON[script.stem], capsys)
    handed_on = [word for word in words[at:] if word.startswith("--") and " " in word]  # to finetune.py, in quotes
    assert {word for word in words[at:] if word.startswith("--")} - {*handed_on} <= taken
    for text in handed_on:
        assert {word for word in text.split() if word.startswith("--")} <= flags_of("finetune", capsys)
    for word in words:
        if word.endswith(".yaml"):
            assert (ROOT / word).is_file(), word
