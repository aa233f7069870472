# Copyright 2026 The moleblend_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What a model card has to have before others read it; checked without a connection."""

import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

NEEDED = ("license", "library_name", "pipeline_tag", "tags")


def card_problems(folder: str | Path) -> list[str]:
    """Returns what is wrong with the card of a checkpoint folder, a sentence each.

    Args:
        folder: the card is its README.md.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        return [f"{path} does not exist. The scripts in training/ write it."]
    try:
        card = ModelCard.load(path)
    except (ValueError, yaml.YAMLError) as error:
        return [f"The metadata of {path} cannot be read: {' '.join(str(error).split())}"]
    metadata = card.data.to_dict()
    problems = [f"The metadata has no {name}." for name in NEEDED if not metadata.get(name)]
    if not metadata.get("datasets"):
        problems.append("The metadata names no datasets that the model was trained on.")
    if not metadata.get("model-index"):
        problems.append("The metadata has no results (model-index).")
    problems += [f"A place was not filled in: {place!r}." for place in re.findall(r"\{\{.*?\}\}|\{%.*?%\}", card.text)]
    # Not in code: a SMILES may look like a link, C[C@H](O)C.
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", card.text, flags=re.MULTILINE | re.DOTALL)
    files = re.findall(r"\]\((?!\w+:|#)([^)\s]+)\)", text)
    return problems + [f"It shows {name}, which is not there." for name in files if not (path.parent / name).is_file()]


__all__ = ["card_problems"]
