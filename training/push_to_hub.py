r"""Push a checkpoint to the Hub, after a look at what would be pushed.

Look     python training/push_to_hub.py --folder OUT --repo user/name
Push     python training/push_to_hub.py --folder OUT --repo user/name --private --push

What belongs to a checkpoint is pushed, in one commit: weights, code, processor, card with its pictures and figures, reference
outputs. Datasets, members, checkpoints and logs that lie beside it are not. A checkpoint that is not the model it was when it was
saved, or that holds what nobody should publish, is refused, and told where.
"""

import argparse
import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from safetensors import SafetensorError

from moleblend_hf.cards import card_problems
from moleblend_hf.verification import FACTS_FILE, OUTPUTS_FILE, verify

REQUIRED = ("README.md", "config.json", "preprocessor_config.json", FACTS_FILE, OUTPUTS_FILE)
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
WEIGHTS_INDEX = "model.safetensors.index.json"
BELONGS = (
    *REQUIRED,
    *WEIGHTS,
    WEIGHTS_INDEX,
    "*_moleblend*.py",
    "training_settings.json",
    "metrics.json",
    "metrics.jsonl",
    "*.png",
    "LICENSE",
)
# Files that run code when they are loaded, by their names or by how they begin (pickle, and the archive of torch.save).
PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
PICKLE_START = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")
TEXTS = (".json", ".jsonl", ".md", ".py")
SECRETS = {
    "a token of the Hub": r"(?<!\w)hf_[A-Za-z0-9]{20,}",
    "a key of AWS": r"(?<!\w)(?:AKIA|ASIA)[A-Z0-9]{16}(?!\w)",
    "a token of GitHub": r"(?<!\w)(?:gh[pousr]_|github_pat_)\w{20,}",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
}
# Two parts or more, so that neither a URL nor the direction of a bond in a SMILES is one; or a drive of Windows.
ABSOLUTE_PATH = re.compile(
    r"""(?<![^\s"'`=(\[{,;|<>])(?:file://)?(?:/[A-Za-z][\w.+-]+(?:/[\w.+@-]+)+|[A-Za-z]:[\\/]+\w[^\s"'`]*)"""
)
# What cards say where the name of the checkpoint is not known yet.
PLACEHOLDER = "path/to/this/folder"


def belonging(folder: Path) -> list[Path]:
    """The files in a folder that are pushed, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.is_file() and _belongs(path.name))


def _belongs(name: str) -> bool:
    return _is_any(name, BELONGS)


def _is_any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def problems(folder: Path) -> list[str]:
    """Why a folder is not pushed, a line each; empty if it can be."""
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    missing = [f"{name} is missing." for name in REQUIRED if name not in files]
    if not any(fnmatch.filter(files, pattern) for pattern in WEIGHTS):
        missing.append(f"There are no weights: {' or '.join(WEIGHTS)}.")
    found = [
        f"{name} is, or may be, a pickle, which runs code when it is loaded. Delete it, or keep it elsewhere."
        for name, path in files.items()
        if path.suffix in PICKLES or PICKLE_START.match(_start(path))
    ]
    for path in belonging(folder):
        if path.suffix in TEXTS:
            found += text_problems(path)
    if "README.md" in files:
        found += card_problems(folder)
        card = files["README.md"].read_text(encoding="utf-8", errors="replace")
        found += [
            f"The card shows {picture}, which is not among the files that are pushed."
            for picture in re.findall(r"!\[[^\]]*\]\((?!https?:)([^)\s]+)\)", card)
            if (folder / picture).is_file() and not ("/" not in picture and _belongs(picture))
        ]
    if not missing:
        try:
            report = verify(folder)
            found += [] if report.ok else [str(report)]
        except (OSError, ValueError, SafetensorError) as error:
            found.append(f"It does not load: {error}")
    return missing + found


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def text_problems(path: Path) -> Iterator[str]:
    """Secrets, which are not repeated, and paths of this machine, with their lines."""
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        for what, pattern in SECRETS.items():
            if re.search(pattern, line):
                yield f"{path.name}, line {number}: {what}. Remove it, and revoke it if others could read it."
        for match in ABSOLUTE_PATH.findall(line):
            yield f"{path.name}, line {number}: the absolute path {match}. Write a name or a relative path in its place."


def push(folder: Path, repo: str, private: bool = False, revision: str | None = None, create_pr: bool = False) -> str:
    """Push in one commit, so that a connection that breaks leaves nothing half there, and return its address.

    Weights that an earlier push left in the repository and that are no longer part of the checkpoint are deleted in the same
    commit: of two sets, the loader could choose the old one. Nothing else is.
    """
    api = HfApi()
    repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo).private:
        raise ValueError(f"{repo} is there, and public. Make it private on the Hub first, or push to another name.")
    if revision is not None and not create_pr:
        api.create_branch(repo, branch=revision, exist_ok=True)
    files = belonging(folder)
    names = {path.name for path in files}
    stale = [
        name
        for name in api.list_repo_files(repo, revision=revision)
        if "/" not in name and _is_any(name, (*WEIGHTS, WEIGHTS_INDEX)) and name not in names
    ]
    additions = [CommitOperationAdd(path.name, _content(path, repo)) for path in files]
    commit = api.create_commit(
        repo,
        operations=[*additions, *(CommitOperationDelete(name) for name in stale)],
        commit_message="Upload checkpoint",
        revision=revision,
        create_pr=create_pr,
    )
    return commit.pr_url or commit.commit_url


def _content(path: Path, repo: str) -> Path | bytes:
    """A file, or the card with the name of the repository in its examples."""
    if path.name != "README.md":
        return path
    return path.read_text(encoding="utf-8").replace(PLACEHOLDER, repo).encode()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; without --push nothing is sent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="checkpoint, as the training scripts write it")
    parser.add_argument("--repo", required=True, help="user/name on the Hub; made if it is not there")
    parser.add_argument("--private", action="store_true", help="only you may see it")
    parser.add_argument("--revision", help="branch to push to, made if it is not there (default: main)")
    parser.add_argument("--create_pr", action="store_true", help="propose it as a pull request")
    parser.add_argument("--push", action="store_true", help="push it; left out, only say what would be pushed")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """List the files, look for problems and, with --push and without problems, push."""
    args = parse_args(argv)
    if not args.folder.is_dir():
        raise SystemExit(f"{args.folder} is not a folder. Give one that pretrain.py or finetune.py wrote.")
    files = belonging(args.folder)
    for path in files:
        print(f"{path.stat().st_size / 1e6:12,.3f} MB  {path.name}")
    print(f"{sum(path.stat().st_size for path in files) / 1e6:12,.3f} MB  in {len(files)} files, for {args.repo}")
    if left_out := sorted(
        {path.name + "/" * path.is_dir() for path in args.folder.iterdir()} - {path.name for path in files}
    ):
        print(f"Not pushed: {', '.join(left_out)}")
    if found := problems(args.folder):
        raise SystemExit("Refused:\n" + "\n".join(f"- {problem}" for problem in found))
    print("It is the model that was saved, and no problem was found.")
    if not args.push:
        print("Nothing was sent. Add --push to do so.")
        return
    print(f"Pushed: {push(args.folder, args.repo, args.private, args.revision, args.create_pr)}")


if __name__ == "__main__":
    main()
