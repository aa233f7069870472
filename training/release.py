r"""Make the folder of a released checkpoint from that of a pretraining: weights in half the bytes, the evaluation in the card.

    python training/release.py --folder outputs/moleblend-small --output model_cards/moleblend-small --evaluation EVALUATION.md

The weights are stored in `--dtype`, but loaded, and computed with, in float32. What the rounding changes is measured on the reference
molecules at every depth of the model and stated in the card; the reference outputs of the new folder are those of the rounded weights.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from evaluation import held_out_results, run_figures
from moleblend_hf import MoleBlendForPreTraining, MoleBlendProcessor
from moleblend_hf.verification import FACTS_FILE, OUTPUTS_FILE, verify, write_reference_outputs
from reporting import read_metrics, write_card

SETTINGS_FILE, METRICS_FILE = "training_settings.json", "metrics.jsonl"
COPIED = (SETTINGS_FILE, METRICS_FILE, "losses.png", FACTS_FILE, OUTPUTS_FILE)
LICENSE = Path(__file__).parents[1] / "LICENSE"
DTYPES = ("float16", "bfloat16", "float32")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="what pretrain.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; its name is that of the model")
    parser.add_argument("--dtype", default="float16", choices=DTYPES, help="of the weights in the file")
    parser.add_argument("--evaluation", type=Path, help="Markdown for the card, from headings of the third level down")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Write the folder, and say what the rounding changed."""
    args = parse_args(argv)
    if args.output.resolve() == args.folder.resolve():
        raise SystemExit("--output is --folder. Name another folder: the weights that were trained stay as they are.")
    report = verify(args.folder)
    if not report.ok:
        raise SystemExit(str(report))
    model = MoleBlendForPreTraining.from_pretrained(args.folder)
    processor = MoleBlendProcessor.from_pretrained(args.folder)
    dtype = getattr(torch, args.dtype)
    weights = {name: values.to(dtype) for name, values in model.state_dict().items()}
    if lost := [name for name, values in weights.items() if not values.isfinite().all()]:
        raise SystemExit(f"{lost[0]} has values that {args.dtype} cannot hold. Take --dtype bfloat16.")

    args.output.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copyfile(args.folder / name, args.output / name)
    shutil.copyfile(LICENSE, args.output / LICENSE.name)
    model.save_pretrained(
        args.output, state_dict=weights
    )  # the config keeps the dtype of the model: that it is loaded in
    processor.save_pretrained(args.output)
    change = max(verify(args.output).deviations.values())
    write_reference_outputs(MoleBlendForPreTraining.from_pretrained(args.output), processor, args.output)
    rows = read_metrics(args.output / METRICS_FILE)
    facts = json.loads((args.output / SETTINGS_FILE).read_text(encoding="utf-8"))
    write_card(
        args.output / "README.md",
        model_name=f"MoleBLEND, {args.output.resolve().name}",
        config=model.config,
        results=held_out_results(rows),
        figures=run_figures(rows, facts["settings"]["batch_size"]),
        stored={"dtype": args.dtype, "change": change},
        evaluation=args.evaluation.read_text(encoding="utf-8") if args.evaluation else None,
        **facts,
    )
    report = verify(args.output)
    if not report.ok:
        raise SystemExit(str(report))
    print(
        f"{args.output}: weights as {args.dtype}, which changes the reference outputs by up to {change:.1e} of the largest"
    )
    print(report)


if __name__ == "__main__":
    main()
