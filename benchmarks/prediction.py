"""Predicting for a long table with `training/predict.py`, killed once and resumed: molecules a second, memory over time.

    python benchmarks/prediction.py --input hiv.csv.gz --num_rows 1000000                   # a small model, untrained
    python benchmarks/prediction.py --input hiv.csv.gz --model checkpoints/esol --chemprop chemprop

The SMILES of a table are repeated to that many rows; ids are the row numbers. `kill -9` ends the run when half of the parts
are done; the same command takes it up again, and the output is checked: every row once, in order. Rates are those of the two
runs without the seconds until the first part is done. With `--chemprop`, its command (of an environment of its own; `pip
install chemprop`) predicts for the same rows on the same machine, less those that cannot be read, with its default model trained for three epochs.
"""

import argparse
import csv
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import psutil
import pyarrow.parquet as pq
from joblib import cpu_count

from moleblend_hf import MoleBlendConfig, MoleBlendForSequenceClassification, MoleBlendProcessor
from parts import makes_conformers
from predict import CONFORMERS_A_PART, RECORDS_A_PART
from sources import open_source

SCRIPT = Path(__file__).parents[1] / "training" / "predict.py"
INTERVAL = 1.0  # seconds between two looks at the memory
CHEMPROP_TRAINING_ROWS = 500


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="CSV of SMILES")
    parser.add_argument("--num_rows", type=int, default=1_000_000)
    parser.add_argument(
        "--model", type=Path, help="fine-tuned checkpoint; else a small model, 2D, with random weights"
    )
    parser.add_argument("--num_proc", type=int, default=cpu_count())
    parser.add_argument("--chemprop", help="chemprop's command, to compare with")
    return parser.parse_args(argv)


def save_small_model(folder: Path) -> Path:
    """4 layers of width 128, 2D."""
    config = MoleBlendConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_labels=1,
        problem_type="regression",
    )
    MoleBlendForSequenceClassification(config).save_pretrained(folder)
    MoleBlendProcessor(modality="2d").save_pretrained(folder)
    return folder


def repeat(source: Path, num_rows: int, target: Path) -> list[str]:
    """Write the SMILES of a table again and again, and return those it has."""
    smiles = [record.smiles or "" for record in open_source("csv", source).records()]
    with target.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["smiles"])
        writer.writerows([text] for text in itertools.islice(itertools.cycle(smiles), num_rows))
    return smiles


def memory(process: psutil.Process) -> float:
    """MiB of a process and all it started, shared pages counted once."""
    total = 0
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 2**20


def watch(command: list[str], work: Path, kill_at: int | None) -> tuple[list[tuple[float, int, float]], int]:
    """Run predict.py; return (seconds, parts done, MiB) over time and the exit code. Kill it when so many parts are done."""
    seen, start = [], time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = psutil.Popen(command, stdout=log, stderr=log)
        while process.poll() is None:
            num_done = len(list(work.glob("predictions-*.parquet"))) if work.is_dir() else 0
            seen.append((time.perf_counter() - start, num_done, memory(process)))
            if kill_at is not None and num_done >= kill_at:
                process.kill()
            time.sleep(INTERVAL)
        log.seek(0)
        if process.returncode > 0:
            print(log.read().decode(errors="replace")[-3000:])
    return seen, process.wait()


def rate(seen: list[tuple[float, int, float]], num_rows: int, num_parts: int) -> float:
    """Molecules a second between the first and the last part that were seen to be done."""
    made = [(seconds, done) for seconds, done, _ in seen if seen[0][1] < done]
    (first, done_first), (last, done_last) = made[0], max(made, key=lambda point: (point[1], -point[0]))
    return (done_last - done_first) * num_rows / num_parts / (last - first) if last > first else float("nan")


def check(output: Path, smiles: list[str], num_rows: int) -> list[str]:
    """Raise unless every row is there once, in order; return the SMILES of the rows without an error."""
    row, readable = 0, []
    with pq.ParquetFile(output) as file:
        for batch in file.iter_batches(columns=["id", "smiles", "error"]):
            for id, text, error in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                if id != str(row) or text != smiles[row % len(smiles)]:
                    raise RuntimeError(f"Row {row} of the output is {id!r}, {text!r}.")
                row += 1
                if error is None:
                    readable.append(text)
    if row != num_rows:
        raise RuntimeError(f"The output has {row:,} rows, the input {num_rows:,}.")
    return readable


def time_chemprop(command: str, smiles: list[str], folder: Path) -> float:
    """Seconds of `chemprop predict` with a model of its default size. It ends at a SMILES that it cannot read."""
    training, table = folder / "training.csv", folder / "readable.csv"
    rows = [f"{text},{len(text)}\n" for text in smiles]
    training.write_text("smiles,length\n" + "".join(rows[:CHEMPROP_TRAINING_ROWS]))
    table.write_text("smiles,length\n" + "".join(rows))
    train = [command, "train", "--data-path", training, "--epochs", "3", "--output-dir", folder / "chemprop"]
    subprocess.run([*map(str, train), "--target-columns", "length"], check=True, capture_output=True)
    model = next((folder / "chemprop").rglob("best.pt"))
    start = time.perf_counter()
    predict = [command, "predict", "--test-path", table, "--model-paths", model, "--preds-path", folder / "preds.csv"]
    subprocess.run([*map(str, predict), "--batch-size", "256"], check=True, capture_output=True)
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    """Measure and print a table."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table, output = folder / "table.csv", folder / "predictions.parquet"
        model = args.model or save_small_model(folder / "model")
        smiles = repeat(args.input, args.num_rows, table)
        command = [sys.executable, str(SCRIPT), "--model", str(model), "--input", str(table), "--output", str(output)]
        command += ["--num_proc", str(args.num_proc)]
        is_slow = makes_conformers(MoleBlendProcessor.from_pretrained(model).modality)
        rows_a_part = CONFORMERS_A_PART if is_slow else RECORDS_A_PART
        work, num_parts = folder / "predictions.parquet.parts", -(-args.num_rows // rows_a_part)
        killed, code = watch(command, work, num_parts // 2)
        print(f"killed (exit code {code}) after {killed[-1][0]:.0f} s with {killed[-1][1]} of {num_parts} parts done")
        resumed, code = watch(command, work, None)
        if code:
            raise RuntimeError(f"predict.py ended with exit code {code}.")
        readable = check(output, smiles, args.num_rows)
        print(f"{args.num_rows:,} rows, each once and in order, {args.num_rows - len(readable):,} with an error\n")
        print("| run | molecules/s | seconds | MiB at 1/4 | at 1/2 | at 3/4 | peak |\n|---|---|---|---|---|---|---|")
        for label, seen in (("until it was killed", killed), ("resumed", resumed)):
            sizes = [size for _, _, size in seen]
            quarters = " | ".join(f"{sizes[len(sizes) * quarter // 4]:.0f}" for quarter in (1, 2, 3))
            speed = rate(seen, args.num_rows, num_parts)
            print(f"| {label} | {speed:,.0f} | {seen[-1][0]:.0f} | {quarters} | {max(sizes):.0f} |")
        if args.chemprop:
            seconds = time_chemprop(args.chemprop, readable, folder)
            print(f"| chemprop | {len(readable) / seconds:,.0f} | {seconds:.0f} | | | | |")


if __name__ == "__main__":
    main()
