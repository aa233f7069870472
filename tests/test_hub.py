"""What is pushed to a Hub comes back in another process that has neither the package nor the training scripts.

The Hub is `hub_server.py`. Each client is a process of its own, online with that Hub alone and with an empty cache.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, environment
from tiny import OUTPUTS

TESTS = Path(__file__).parent
WITHOUT_THE_PACKAGE = """
import sys
from importlib.util import find_spec
sys.modules["moleblend_hf"] = None
assert find_spec("preprocess") is None
"""
WITH_THE_SCRIPTS = f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent / 'training')!r}]\n"
CAUGHT = """
import json
def caught(act, *args, **kwargs):
    try:
        act(*args, **kwargs)
    except Exception as error:
        return [cls.__name__ for cls in type(error).__mro__], str(error)
    return [], ""
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


def client(hub: Hub, folder: Path, code: str, home: str, token: str | None = "hf_user", **changes: str):
    """What `code` prints as JSON in its last line; its cache is the folder `home`."""
    environ = environment(hub, folder / home, token, **changes)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environ, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


AUTO_CLASSES = {
    "base": "AutoModel",
    "pretraining": "AutoModelForPreTraining",
    "classification": "AutoModelForSequenceClassification",
}
PUSH_MODELS = """
from huggingface_hub import HfApi
import moleblend_hf as package
from tiny import tiny_config
processor, outputs = package.MoleBlendProcessor(max_atoms=77), {}
for name, auto in AUTO_CLASSES.items():
    model = getattr(package, auto.replace("AutoModel", "MoleBlend") + "Model" * (auto == "AutoModel"))(tiny_config())
    model.push_to_hub(f"user/{name}", private=name == "classification")
    processor.push_to_hub(f"user/{name}")
    outputs[name] = outputs_of(model, processor)
    if name == "base":
        HfApi().create_tag("user/base", tag="v1")
        first = HfApi().model_info("user/base").sha
        with torch.no_grad():
            model.graph_token.add_(1)
        pull = model.push_to_hub("user/base", create_pr=True)
        model.push_to_hub("user/base", revision="next")
        model.push_to_hub("user/base", commit_message="Better")
        outputs["better"] = outputs_of(model, processor)
torch.save(outputs, "outputs.pt")
assert HfApi().whoami()["name"] == "user"
assert [branch.name for branch in HfApi().list_repo_refs("user/base").branches] == ["main", "next"]
print(json.dumps([first, pull.pr_revision]))
"""
LOAD_MODELS = """
import transformers
expected = torch.load("outputs.pt", weights_only=True)
for name, auto, repo, revision in CASES:
    loading = {"revision": revision, "trust_remote_code": True}
    model = getattr(transformers, auto).from_pretrained(repo, **loading)
    processor = transformers.AutoProcessor.from_pretrained(repo, **loading)
    assert processor.max_atoms == 77
    torch.testing.assert_close(outputs_of(model, processor), expected[name])
print(json.dumps(len(CASES)))
"""


def test_models_and_processors_come_back_without_the_package(hub, tmp_path):
    """The three classes give their outputs again, also at a pinned revision, and from the cache when there is no network."""
    push = WITH_THE_SCRIPTS + OUTPUTS + f"AUTO_CLASSES = {AUTO_CLASSES!r}\n" + PUSH_MODELS
    first, pull = client(hub, tmp_path, push, "a")
    assert [name for name in AUTO_CLASSES if hub.repos["model", f"user/{name}"].private] == ["classification"]
    assert hub.commits("user/base") == ["Better", "Upload processor", "Upload model", "initial commit"]
    files = hub.repos["model", "user/base"].at("main").files
    assert {"config.json", "preprocessor_config.json", "modeling_moleblend.py", "README.md"} <= set(files)
    assert [path for path, file in files.items() if file.lfs] == ["model.safetensors"]

    cases = [(name, auto, f"user/{name}", "main") for name, auto in AUTO_CLASSES.items() if name != "base"]
    cases += [("base", "AutoModel", "user/base", revision) for revision in ("v1", first)]
    cases += [("better", "AutoModel", "user/base", revision) for revision in ("main", "next", pull)]
    load = WITHOUT_THE_PACKAGE + OUTPUTS + f"CASES = {cases!r}\n" + LOAD_MODELS
    assert client(hub, tmp_path, load, "b") == len(cases)
    asked = len(hub.requests)
    assert client(hub, tmp_path, load, "b", HF_HUB_OFFLINE="1") == len(cases)
    assert len(hub.requests) == asked
    assert hub.strangers == []


BROKEN_PUSHES = """
import time
time.sleep = lambda seconds: None  # between attempts
from huggingface_hub import HfApi
from moleblend_hf import MoleBlendModel
from tiny import tiny_config
model, errors, states = MoleBlendModel(tiny_config()), [], []
for attempt in range(3):
    errors.append(caught(model.push_to_hub, "user/model"))
    states.append([sorted(HfApi().list_repo_files("user/model")), HfApi().model_info("user/model").sha])
print(json.dumps([errors, states]))
"""


def test_a_push_that_breaks_off_changes_nothing(hub, tmp_path):
    """Neither in the middle of the weights, for as long as the client tries, nor of the commit; a later push works."""
    before = hub.add("user/model", {"config.json": b"{}"}).at("main")
    hub.breaks.update(upload=6 + 1, commit=1)  # six attempts of the first push; the second push tries again
    (weights, commit, none), states = client(hub, tmp_path, WITH_THE_SCRIPTS + CAUGHT + BROKEN_PUSHES, "a")
    assert (weights[0][0], weights[1]) == ("RuntimeError", "Error while uploading 'model.safetensors' to the Hub.")
    assert "TransportError" in commit[0]  # of httpx, and no OSError
    assert none == [[], ""]
    assert states[:2] == [[[".gitattributes", "config.json"], before.id]] * 2
    assert {"config.json", "model.safetensors"} < set(states[2][0])
    assert hub.commits("user/model") == ["Upload model", "added", "initial commit"]
    assert hub.breaks.total() == 0


PUSH_DATA = """
import dataclasses
import preprocess
FLAGS = "--source csv --input molecules.csv --split random --private".split()
if __name__ == "__main__":
    first = ["--output", "first", "--rows_per_file", "20", "--push_to_hub", "user/data"]
    broken = caught(preprocess.main, FLAGS + first)
    assert "TransportError" in broken[0], broken
    settings = preprocess.parse_args(FLAGS + first)
    preprocess.push(settings)
    preprocess.push(dataclasses.replace(settings, push_to_hub="user/again"))
    preprocess.main(FLAGS + ["--output", "second", "--push_to_hub", "user/again"])
    print(json.dumps("pushed"))
"""
LOAD_DATA = """
from pathlib import Path
import pyarrow.parquet as pq
from datasets import load_dataset
refused = caught(load_dataset, "user/data", token=False)
loaded, streamed = load_dataset("user/data"), load_dataset("user/data", streaming=True)
assert set(loaded) == set(streamed) == {"train", "validation", "test"}
for split in loaded:
    rows = [row for path in sorted(Path("first/data").glob(f"{split}-*")) for row in pq.read_table(path).to_pylist()]
    assert loaded[split].to_list() == list(streamed[split]) == rows
print(json.dumps([refused, loaded.num_rows]))
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory) -> Iterator[tuple[Hub, Path]]:
    """A Hub with datasets that preprocess.py pushed, the first one after an attempt that broke off; and its folder."""
    folder = tmp_path_factory.mktemp("datasets")
    table = "".join(f"{'C' * size}O\n" for size in range(1, 51))
    (folder / "molecules.csv").write_text(f"smiles\n{table}", encoding="utf-8")
    with Hub() as hub:
        hub.breaks["commit"] = 1
        client(hub, folder, WITH_THE_SCRIPTS + CAUGHT + PUSH_DATA, "a")
        yield hub, folder


def on_disk(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dataset_loads_and_streams_without_the_scripts(pushed):
    hub, folder = pushed
    assert hub.repos["dataset", "user/data"].private
    assert hub.commits("user/data", "dataset") == ["Upload folder using huggingface_hub", "initial commit"]
    files = hub.files("user/data", "dataset")
    del files[".gitattributes"]
    assert files == on_disk(folder / "first")
    assert hub.strangers == []

    code = WITHOUT_THE_PACKAGE + CAUGHT + LOAD_DATA
    refused, num_rows = client(hub, folder, code, "b", HF_UPDATE_DOWNLOAD_COUNTS="0")
    assert refused[0][0] == "DatasetNotFoundError"
    assert num_rows == {"train": 40, "validation": 5, "test": 5}
    # `datasets` asks whether there is a viewer beside the Hub, and does without; unless told not to, also S3, to count.
    assert set(hub.strangers) <= {"datasets-server.127.0.0.1"}


def test_a_dataset_that_is_pushed_over_another_replaces_it(pushed):
    hub, folder = pushed
    data = {path for path in hub.files("user/again", "dataset") if path.startswith("data/")}
    assert data == {path for path in on_disk(folder / "second") if path.startswith("data/")}


ERRORS = """
import transformers
from datasets import load_dataset
from huggingface_hub import get_session, hf_hub_download, snapshot_download
config_of = transformers.AutoConfig.from_pretrained
print(json.dumps([
    caught(hf_hub_download, "user/absent", "config.json"),
    caught(snapshot_download, "user/private"),
    caught(hf_hub_download, "user/open", "config.json", revision="absent"),
    caught(snapshot_download, "user/open", revision="absent"),
    caught(hf_hub_download, "user/open", "absent.json"),
    caught(hf_hub_download, "user/gated", "config.json"),
    caught(hf_hub_download, "user/gated", "config.json", token=False),
    caught(hf_hub_download, "user/open", "config.json", token="hf_unknown"),
    caught(load_dataset, "user/absent"),
    caught(load_dataset, "user/gated"),
    caught(config_of, "user/absent"),
    caught(config_of, "user/gated"),
    caught(config_of, "user/open", revision="absent"),
    caught(get_session().get, "https://huggingface.co/api/models/user/open"),
]))
"""
EXPECTED_ERRORS = [
    ("RepositoryNotFoundError", "user/absent"),
    ("RepositoryNotFoundError", "user/private"),
    ("RevisionNotFoundError", "Invalid rev id: absent"),
    ("RevisionNotFoundError", "Invalid rev id: absent"),
    ("RemoteEntryNotFoundError", "absent.json"),
    ("GatedRepoError", "Access to user/gated is restricted."),
    ("GatedRepoError", "Access to user/gated is restricted."),
    ("HfHubHTTPError", "Invalid credentials in Authorization header"),
    ("DatasetNotFoundError", "Dataset 'user/absent' doesn't exist on the Hub or cannot be accessed."),
    ("DatasetNotFoundError", "Dataset 'user/gated' is a gated dataset on the Hub."),
    ("OSError", "user/absent is not a local folder and is not a valid model identifier"),
    ("OSError", "You are trying to access a gated repo."),
    ("OSError", "absent is not a valid git identifier"),
    ("ProxyError", "502"),
]


def test_what_is_absent_or_not_allowed_raises_the_hubs_own_errors(hub, tmp_path):
    config = {"config.json": b"{}"}
    hub.add("user/open", config)
    hub.add("user/private", config, private=True)
    hub.add("user/gated", config, gated=True)
    hub.add("user/gated", {"README.md": b"", "a.csv": b"a\n1\n"}, "dataset", gated=True)
    errors = client(hub, tmp_path, CAUGHT + ERRORS, "a", token="hf_guest")
    for (kinds, message), (kind, part) in zip(errors, EXPECTED_ERRORS, strict=True):
        assert kinds[0] == kind
        assert part in message
    assert hub.strangers == ["huggingface.co:443"]  # the last request; the others stayed here
