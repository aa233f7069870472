"""Checkpoints saved with one version of transformers load with the other and give equal outputs, there and back.

    python tests/version_matrix.py OLD/bin/python NEW/bin/python

Each is an interpreter with this package's requirements, say with transformers 5.14 (the oldest supported) and the newest.
The package itself is taken from this repository. Every kind of checkpoint is saved with each of the two, loaded with the
other by the auto classes and by `pipeline`, with this package and without it (by the code in the folder), saved there again
and loaded where it came from. A table says how far outputs are apart, relative to the largest. The exit status is 1 if
they are by more than `TOLERANCE`, if a weight is missing or left over, or if a process fails.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-5  # of float32, should the versions of torch differ as well
SMILES = ["CC(=O)Oc1ccccc1C(=O)O", "C", "[Na+].CC(=O)[O-]", "C/C=C/C(=O)/C=C\\CCl"]
AUTO_CLASSES = {
    "base": "AutoModel",
    "pretraining": "AutoModelForPreTraining",
    "fine-tuned": "AutoModelForSequenceClassification",
    "atoms": "AutoModelForTokenClassification",
    "ensemble": "AutoModelForSequenceClassification",
}
PREDICTING = ("fine-tuned", "atoms", "ensemble")


# In the processes


def save(folder: Path) -> None:
    """Write a checkpoint of each kind, with its outputs."""
    import torch

    import moleblend_hf as package

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    targets = {"id2label": {0: "gap", 1: "mu"}, "target_units": ["eV", "D"], "problem_type": "regression",
               "target_transforms": ["log10", "none"], "target_means": [0.5, -1.0], "target_scales": [2.0, 0.1],
               "conformal_coverage": 0.9, "conformal_quantiles": [0.3, None]}  # fmt: skip
    config = package.MoleBlendConfig(initializer_range=0.3, **sizes)
    fine_tuned = package.MoleBlendConfig(initializer_range=0.3, **sizes, **targets)
    members = [package.MoleBlendForSequenceClassification(fine_tuned) for _ in range(2)]
    models = {
        "base": package.MoleBlendModel(config),
        "pretraining": package.MoleBlendForPreTraining(config),
        "fine-tuned": members[0],
        "atoms": package.MoleBlendForTokenClassification(fine_tuned),
        "ensemble": package.MoleBlendEnsembleForSequenceClassification.from_members(members),
    }
    for kind, model in models.items():
        write(kind, folder / kind, model.eval(), package.MoleBlendProcessor(max_atoms=77), package.MoleBlendPipeline)


def write(kind: str, folder: Path, model: Any, processor: Any, pipeline_class: Any) -> None:
    """Save a checkpoint as the training scripts do, and its outputs beside it."""
    from safetensors.torch import save_file

    if kind in PREDICTING:
        predict = pipeline_class(model=model, feature_extractor=processor, device="cpu")
        predict.save_pretrained(folder)
        (folder / "answers.json").write_text(json.dumps(predict(SMILES)))
    else:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    save_file(outputs_of(model, processor), folder / "outputs.safetensors")


def outputs_of(model: Any, processor: Any) -> dict[str, Any]:
    """All tensors that the model returns for molecules of which two have a geometry."""
    import numpy as np
    import torch

    draws = np.random.default_rng(0)
    sizes = [graph.num_atoms for graph in processor.featurize_many(SMILES)]
    geometries = [draws.normal(scale=3, size=(size, 3)) if row % 2 == 0 else None for row, size in enumerate(sizes)]
    given = {"generator": torch.Generator().manual_seed(0)} if "PreTraining" in type(model).__name__ else {}
    with torch.no_grad():
        outputs = model.eval()(**processor(SMILES, geometries), **given)
    return {name: value.contiguous() for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def load(folder: Path, again: Path, *, remote: bool) -> None:
    """Load every checkpoint, print how it compares, and save it again."""
    if remote:
        sys.modules["moleblend_hf"] = None  # type: ignore[assignment]
    else:
        import moleblend_hf  # noqa: F401
    import torch
    import transformers
    from safetensors.torch import load_file

    for kind, auto_class in AUTO_CLASSES.items():
        source = folder / kind
        model, loading = getattr(transformers, auto_class).from_pretrained(
            source, trust_remote_code=remote, output_loading_info=True
        )
        assert type(model).__module__.startswith("transformers_modules") == remote, type(model)
        processor = transformers.AutoProcessor.from_pretrained(source, trust_remote_code=remote)
        assert processor.max_atoms == 77, processor
        expected = load_file(source / "outputs.safetensors")
        found = outputs_of(model, processor)
        wrong = {name: sorted(map(str, keys)) for name, keys in loading.items() if keys}
        if expected.keys() != found.keys():
            wrong["outputs"] = sorted(expected.keys() ^ found.keys())
        deviation = max(
            float((found[name].double() - values.double()).abs().nan_to_num(0).max() / values.double().abs().nan_to_num(0).max().clamp(min=1))
            for name, values in expected.items() if name in found
        )  # fmt: skip
        for name in expected.keys() & found.keys():
            if not torch.equal(found[name].isnan(), expected[name].isnan()):
                deviation = float("inf")
        pipeline_class = None
        if kind in PREDICTING:
            predict = transformers.pipeline(
                "molecular-property-prediction", model=str(source), trust_remote_code=True, device="cpu"
            )
            pipeline_class = type(predict)
            answers = numbers_of(json.loads(json.dumps(predict(SMILES))))
            before = numbers_of(json.loads((source / "answers.json").read_text()))
            if [value for value in answers if not isinstance(value, float)] != [
                value for value in before if not isinstance(value, float)
            ]:
                wrong["pipeline"] = ["other answers"]
            for value, other in zip(answers, before, strict=True):
                if isinstance(value, float):
                    deviation = max(deviation, abs(value - other) / max(1.0, abs(other)))
        write(kind, again / kind, model, processor, pipeline_class)
        print("RESULT " + json.dumps([kind, deviation, wrong]))


def numbers_of(answer: Any) -> list:
    """The leaves of a nested answer, in order."""
    if isinstance(answer, dict):
        return [leaf for key in sorted(answer) for leaf in (key, *numbers_of(answer[key]))]
    if isinstance(answer, list):
        return [leaf for each in answer for leaf in numbers_of(each)]
    return [answer]


# The command


def run(python: str, folder: Path, *stage: str) -> str:
    """What a stage prints in an interpreter, with a cache of its own."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"HF_HOME": cache, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
        result = subprocess.run(
            [python, __file__, "--stage", *stage], capture_output=True, text=True, cwd=folder, env=environment, check=False
        )  # fmt: skip
    if result.returncode:
        raise SystemExit(f"{python} failed at {' '.join(stage)}:\n{result.stderr[-5000:]}")
    return result.stdout


def version_of(python: str) -> str:
    """Of transformers."""
    code = "import importlib.metadata; print(importlib.metadata.version('transformers'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def matrix(pythons: list[str], folder: Path) -> int:
    """Print a row for each way between the two, and return how many went wrong."""
    names = dict(zip(pythons, map(version_of, pythons), strict=True))
    print("| Saved with | Loaded with | Code | Checkpoint | Deviation | |\n|---|---|---|---|---|---|")
    failed = 0
    for saving, loading in (pythons, pythons[::-1]):
        start = folder / names[saving]
        run(saving, folder, "save", str(start))
        for way in ("package", "folder"):
            there, back = (start.with_name(f"{start.name}-{way}-{step}") for step in ("there", "back"))
            for python, source, target, saved in (
                (loading, start, there, names[saving]),
                (saving, there, back, f"{names[saving]}, then {names[loading]}"),
            ):
                printed = run(python, folder, way, str(source), str(target))
                results = [json.loads(line[7:]) for line in printed.splitlines() if line.startswith("RESULT ")]
                assert len(results) == len(AUTO_CLASSES)
                for kind, deviation, wrong in results:
                    is_wrong = bool(wrong) or not deviation <= TOLERANCE
                    failed += is_wrong
                    what = f"WRONG {wrong or ''}" if is_wrong else "equal"
                    print(f"| {saved} | {names[python]} | {way} | {kind} | {deviation:.1e} | {what} |", flush=True)
    return failed


def main() -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", help="two interpreters")
    parser.add_argument("--stage", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage is not None:
        stage, source, *target = args.stage
        if stage == "save":
            save(Path(source))
        else:
            load(Path(source), Path(*target), remote=stage == "folder")
        return 0
    if len(args.pythons) != 2:
        parser.error(f"two interpreters were expected, got {len(args.pythons)}")
    with tempfile.TemporaryDirectory() as folder:
        return 1 if matrix(args.pythons, Path(folder)) else 0


if __name__ == "__main__":
    sys.exit(main())
