"""push_to_hub.py: what it refuses, and what comes back from a Hub in a process that has neither the package nor the scripts."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from test_hub import CAUGHT, WITH_THE_SCRIPTS, WITHOUT_THE_PACKAGE, client
from tiny import OUTPUTS, tiny_config

import push_to_hub
from moleblend_hf import MoleBlendModel, MoleBlendProcessor
from moleblend_hf.verification import write_reference_outputs

RESULT = {
    "task_type": "graph-ml",
    "dataset_type": "esol",
    "dataset_name": "ESOL",
    "metric_type": "mae",
    "metric_value": 0.5,
}


def write_card(folder: Path, text: str = "", **changes) -> None:
    facts = {
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "graph-ml",
        "tags": ["chemistry"],
        "datasets": ["esol"],
        "model_name": "A model",
        "eval_results": [EvalResult(**RESULT)],
    }
    metadata = ModelCardData(**{**facts, **changes}).to_yaml()
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n\n# A model\n\nLoad `path/to/this/folder`.\n{text}\n")


def save(folder: Path, model) -> Path:
    """A checkpoint, and beside it what belongs to its training."""
    processor = MoleBlendProcessor(max_atoms=77)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_reference_outputs(model, processor, folder)
    write_card(folder)
    for name in ("data/rows.parquet", "members/0/model.safetensors", "checkpoints/step-1/optimizer.bin", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"private")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(tmp_path / "folder", MoleBlendModel(tiny_config()))


def append(path: Path, line: str) -> None:
    path.write_text(path.read_text() + line + "\n")


def test_a_dry_run_lists_what_belongs_to_the_checkpoint_and_sends_nothing(folder, capsys):
    push_to_hub.main(["--folder", str(folder), "--repo", "user/model"])  # offline, as all tests are
    listed, _, rest = capsys.readouterr().out.partition("for user/model\n")
    names = re.findall(r"MB  (\S+)$", listed, re.MULTILINE)
    assert names == sorted(names)
    code = {name for name in names if name.endswith(".py")}
    assert {"modeling_moleblend.py", "processing_moleblend.py"} < code
    assert set(names) - code == {
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json"),
        *("reference_outputs.json", "reference_outputs.safetensors"),
    }
    assert "Not pushed: checkpoints/, data/, members/, notes.txt\n" in rest
    assert rest.endswith("Nothing was sent. Add --push to do so.\n")


SPOILED = {
    "pickle by name": (lambda folder: (folder / "model.pt").touch(), r"model.pt is, or may be, a pickle"),
    "pickle by content": (
        lambda folder: torch.save({}, folder / "metrics.json"),
        r"metrics.json is, or may be, a pickle",
    ),
    "path": (
        lambda folder: append(folder / "README.md", "Trained with `--input /home/me/data.csv`"),
        r"README.md, line \d+: the absolute path /home/me/data.csv. Write a name or a relative path",
    ),
    "path of Windows": (
        lambda folder: (folder / "training_settings.json").write_text(json.dumps({"a": "C:\\Users\\me"})),
        r"training_settings.json, line 1: the absolute path C:\\\\Users\\\\me.",
    ),
    "path of Windows with slashes": (
        lambda folder: append(folder / "README.md", "`--input C:/Users/me/data.csv`"),
        r"README.md, line \d+: the absolute path C:/Users/me/data.csv.",
    ),
    "token": (
        lambda folder: append(folder / "modeling_moleblend.py", f"TOKEN = 'hf_{'a1B2' * 8}'"),
        r"modeling_moleblend.py, line \d+: a token of the Hub. Remove it, and revoke it",
    ),
    "key of AWS": (
        lambda folder: append(folder / "README.md", f"AKIA{'A1' * 8}"),
        r"README.md, line \d+: a key of AWS",
    ),
    "private key": (
        lambda folder: append(folder / "README.md", "-----BEGIN OPENSSH PRIVATE " + "KEY-----"),
        r"README.md, line \d+: a private key",
    ),
    "no card": (lambda folder: (folder / "README.md").unlink(), r"README.md"),
    "no metrics": (lambda folder: write_card(folder, eval_results=None), r"model-index"),
    "no data": (lambda folder: write_card(folder, datasets=None), r"names no datasets"),
    "no licence": (lambda folder: write_card(folder, license=None), r"The metadata.* has no license"),
    "broken card": (lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"), r"cannot be read"),
    "no picture": (lambda folder: write_card(folder, "![plot](plot.png)"), r"plot.png, which is not there"),
    "picture elsewhere": (
        lambda folder: write_card(folder, "![plot](data/rows.parquet)"),
        r"The card shows data/rows.parquet, which is not among the files that are pushed",
    ),
    "no reference": (
        lambda folder: (folder / "reference_outputs.json").unlink(),
        r"reference_outputs.json is missing",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"There are no weights: model.safetensors"),
    "broken weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"abc"), r"It does not load: "),
    "other weights": (
        lambda folder: MoleBlendModel(tiny_config()).save_pretrained(folder),
        r"is not the model that was saved.\n  first departs at embeddings",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_nobody_should_publish_is_refused(name, folder):
    spoil, message = SPOILED[name]
    assert push_to_hub.problems(folder) == []
    spoil(folder)
    with pytest.raises(SystemExit, match=f"(?s)Refused:\n.*{message}") as caught:
        push_to_hub.main(["--folder", str(folder), "--repo", "user/model", "--push"])
    assert "a1B2" not in str(caught.value)  # secrets are not repeated


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="absent is not a folder"):
        push_to_hub.main(["--folder", str(tmp_path / "absent"), "--repo", "user/model"])


@pytest.mark.parametrize(
    "text",
    [
        "F/C=C/F",
        "/C(F)=C/F",
        "a/b/c",
        "https://arxiv.org/abs/2307.06235",
        "1 km / h",
        "http://host:80/a",
        "`training/finetune.py`",
        "and/or",
    ],
)
def test_what_only_looks_like_a_path_is_none(text):
    assert push_to_hub.ABSOLUTE_PATH.findall(text) == []


# Of names that a checkpoint's files could have.
MINE = ["mine.txt", "figure.png", "scripts/train_moleblend.py", "old/model.safetensors"]
CASES = {
    "base": "AutoModel",
    "pretraining": "AutoModelForPreTraining",
    "fine-tuned": "AutoModelForSequenceClassification",
    "atoms": "AutoModelForTokenClassification",
    "ensemble": "AutoModelForSequenceClassification",
}
PUSH = (
    f"MINE = {MINE}"
    + """
import time
time.sleep = lambda seconds: None  # between attempts
from pathlib import Path
from huggingface_hub import HfApi
import finetune, push_to_hub
import moleblend_hf as package
from moleblend_hf.verification import verify
from test_push import save, write_card
from tiny import tiny_config
config = dict(num_labels=2, problem_type="regression", target_means=[1.0, 2.0], target_scales=[1.0, 0.1])
config |= dict(id2label={0: "gap", 1: "size"})
def fine_tuned():
    return package.MoleBlendForSequenceClassification(tiny_config(**config))
models = {
    "base": package.MoleBlendModel(tiny_config()),
    "pretraining": package.MoleBlendForPreTraining(tiny_config()),
    "fine-tuned": fine_tuned(),
    "atoms": package.MoleBlendForTokenClassification(tiny_config(**config)),
    "ensemble": package.MoleBlendEnsembleForSequenceClassification.from_members([fine_tuned(), fine_tuned()]),
}
processor = package.MoleBlendProcessor(max_atoms=77)
outputs, broken, states = {}, [], []
for name, model in models.items():
    folder = Path(name)
    outputs[name] = outputs_of(model, processor)
    save(folder, model)
    if "Classification" in type(model).__name__:
        finetune.save(model, processor, folder)  # as a pipeline
    arguments = ["--folder", name, "--repo", f"user/{name}", "--push"] + ["--private"] * (name == "atoms")
    if name == "base":  # twice broken
        for _ in range(2):
            broken.append(caught(push_to_hub.main, arguments))
            states.append(HfApi().list_repo_files("user/base"))
        HfApi().upload_file(path_or_fileobj=b"", path_in_repo="model-00001-of-00002.safetensors", repo_id="user/base")
        for mine in MINE:
            HfApi().upload_file(path_or_fileobj=b"", path_in_repo=mine, repo_id="user/base")
    push_to_hub.main(arguments)
answers = package.MoleBlendPipeline(model=models["ensemble"], feature_extractor=processor)(SMILES)
torch.save(outputs, "outputs.pt")
Path("answers.json").write_text(json.dumps(answers))
write_card(Path("base"), "Another word.")
push_to_hub.main(["--folder", "base", "--repo", "user/base", "--push", "--revision", "next"])
push_to_hub.main(["--folder", "base", "--repo", "user/base", "--push", "--create_pr"])
verified = [str(verify(f"user/{name}")) for name in models] + [str(verify("user/base", revision="next"))]
errors = [
    caught(push_to_hub.main, ["--folder", "base", "--repo", repo, "--push", *flags])
    for repo, flags in (("other/base", []), ("user/base", ["--private"]))
]
errors += [caught(verify, f"other/{name}") for name in ("absent", "gated")]
print(json.dumps({"broken": broken, "states": states, "verified": verified, "errors": errors}))
"""
)
LOAD = """
import transformers
from pathlib import Path
expected = torch.load("../outputs.pt", weights_only=True)
for name, auto in CASES.items():
    model = getattr(transformers, auto).from_pretrained(f"user/{name}", trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(f"user/{name}", trust_remote_code=True)
    assert processor.max_atoms == 77
    torch.testing.assert_close(outputs_of(model, processor), expected[name])
predict = transformers.pipeline("molecular-property-prediction", model="user/ensemble", trust_remote_code=True)
answers, before = predict(SMILES), json.loads(Path("../answers.json").read_text())
for answer, same in zip(answers, before, strict=True):
    for target in ("gap", "size"):
        values = [each["predictions"][target]["value"] for each in (answer, same)]
        assert abs(values[0] - values[1]) < 1e-5, values
load = transformers.AutoModel.from_pretrained
errors = [caught(load, f"other/{name}", trust_remote_code=True) for name in ("absent", "gated")]
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory) -> Iterator[tuple[Hub, Path, dict]]:
    """A Hub to which a process with the package pushed all kinds of checkpoints, the first after two that broke off."""
    folder = tmp_path_factory.mktemp("pushed")
    with Hub() as hub:
        hub.add("other/gated", {"config.json": b"{}"}, gated=True)
        # The first push gives up after six attempts to send the two large files; the second breaks in the commit.
        hub.breaks.update(upload=12, commit=1)
        facts = client(hub, folder, WITH_THE_SCRIPTS + OUTPUTS + CAUGHT + PUSH, "a")
        assert hub.strangers == []
        yield hub, folder, facts


def test_a_push_that_breaks_off_leaves_nothing(pushed):
    """Neither in the middle of the weights nor of the commit; a later push works."""
    hub, _, facts = pushed
    (weights, commit), states = facts["broken"], facts["states"]
    assert weights[0][0] == "RuntimeError"
    assert "Error while uploading" in weights[1]
    assert "TransportError" in commit[0]
    assert states == [[".gitattributes"]] * 2
    assert hub.breaks.total() == 0


def test_exactly_the_checkpoint_is_pushed_in_one_commit(pushed):
    """Weights of an earlier push, which the loader could prefer, go with it; what is no part of a checkpoint stays."""
    hub, folder, _ = pushed
    for name in CASES:
        files = hub.files(f"user/{name}")
        belonging = {path.name: path.read_bytes() for path in push_to_hub.belonging(folder / name)}
        if name == "base":
            assert [files.pop(name) for name in MINE] == [b""] * len(MINE)
            belonging["README.md"] = files["README.md"]  # changed since
        else:
            assert hub.commits(f"user/{name}") == ["Upload checkpoint", "initial commit"]
            belonging["README.md"] = belonging["README.md"].replace(b"path/to/this/folder", f"user/{name}".encode())
        del files[".gitattributes"]
        assert files == belonging
    assert b"Load `user/base`" in hub.files("user/base")["README.md"]
    assert [name for name in CASES if hub.repos["model", f"user/{name}"].private] == ["atoms"]


def test_a_branch_and_a_pull_request_leave_main_alone(pushed):
    hub, _, _ = pushed
    for revision, changed in (("main", False), ("next", True), ("refs/pr/1", True)):
        card = hub.files("user/base", revision=revision)["README.md"].decode()
        assert ("Another word." in card) == changed


def test_what_is_on_the_hub_is_verified(pushed):
    hub, _, facts = pushed
    *mains, branch = facts["verified"]
    for name, text in zip(CASES, mains, strict=True):
        commit = hub.repos["model", f"user/{name}"].at("main").id
        assert text.startswith(f"user/{name} at {commit[:12]} is the model that was saved")
    assert hub.repos["model", "user/base"].at("next").id[:12] in branch


def test_refusals_of_the_hub_are_its_own(pushed):
    _, _, facts = pushed
    other, public, absent, gated = facts["errors"]
    assert other[0][0] == "HfHubHTTPError"
    assert "You have no right to create other/base" in other[1]
    assert public == [["ValueError", *public[0][1:]], public[1]]
    assert "user/base is there, and public" in public[1]
    assert absent[0][0] == "RepositoryNotFoundError"
    assert gated[0][0] == "GatedRepoError"


def test_it_comes_back_without_the_package_also_offline(pushed):
    """All kinds of checkpoints, and the pipeline: from the Hub, then from the cache when there is no network."""
    hub, folder, _ = pushed
    (folder / "elsewhere").mkdir()
    load = WITHOUT_THE_PACKAGE + OUTPUTS + CAUGHT + f"CASES = {CASES!r}\n" + LOAD
    absent, gated = client(hub, folder / "elsewhere", load, "b")
    assert "other/absent is not a local folder and is not a valid model identifier" in absent[1]
    assert "You are trying to access a gated repo." in gated[1]
    asked = len(hub.requests)
    client(hub, folder / "elsewhere", load, "b", HF_HUB_OFFLINE="1")
    assert len(hub.requests) == asked
    assert hub.strangers == []


def test_the_card_keeps_its_metadata(pushed):
    hub, folder, _ = pushed
    card = ModelCard(hub.files("user/ensemble")["README.md"].decode())
    assert card.data.to_dict() == ModelCard.load(folder / "ensemble" / "README.md").data.to_dict()
