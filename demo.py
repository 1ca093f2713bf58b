"""The whole story in minutes, on embedded data and a CPU: train a victim, steal it twice, judge everyone.

python demo.py            (make demo)

Runs the project's own scripts, prints each command, then one table, and saves one picture.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from data_aug.datasets import load_dataset
from evaluation import represent
from models import load_encoder
from stopping import script
from utils import UserError, atomic_path

HERE = Path(__file__).resolve().parent
ARCH = "resnet10w32"
QUERIES = 1500
LOSSES = ("mse", "infonce")
# Everyone is judged on the images that no attacker of this victim may query.
JUDGE = f"--dataset-test shapes --arch {ARCH} --num-labeled 1000 --num-test 1000"
TRAIN = f"--dataset shapes --arch {ARCH} --num-train 4000 --epochs 4 --flat-epochs 1 --batch-size 128 --lr 0.002"
VICTIM = f"--dataset shapes --arch {ARCH} --epochstrain 4"
COPY = f"--datasetsteal shapes --num_queries {QUERIES} --epochs 3"
STEAL = f"{VICTIM} --archstolen {ARCH} {COPY} --flat-epochs 1 --batch-size 32 --lr 0.002"


def call(root: Path, script_name: str, arguments: str) -> float:
    """Run a script, showing its command and its output; seconds taken. UserError when it fails."""
    command = [script_name, *arguments.split(), "--checkpoint-dir", str(root)]
    print(f"\n$ python {' '.join(command)}", flush=True)
    started = time.perf_counter()
    if subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], check=False).returncode:
        raise UserError(f"{script_name} failed: see the line above")
    return time.perf_counter() - started


def run_everything(root: Path) -> list[dict]:
    """The seven commands; one row for each encoder: name, the evaluation's row, seconds to make it."""
    made = {"victim": call(root, "run.py", TRAIN)}
    for loss in LOSSES:
        made[f"copy, {loss}"] = call(root, "steal.py", f"{STEAL} --losstype {loss}")
    made["random encoder"] = 0.0
    for name in made:
        which = {
            "victim": "--modeltype victim --dataset shapes --epochstrain 4",
            "random encoder": "--modeltype random",
        }
        copy = f"--modeltype stolen --dataset shapes {COPY} --losstype {name.removeprefix('copy, ')}"
        call(root, "linear_eval.py", f"{JUDGE} {which.get(name, copy)}")
    results = [json.loads(line) for line in (root / "results.jsonl").read_text().splitlines()]
    return [{"name": name, **row, "made_in": made[name]} for name, row in zip(made, results, strict=True)]


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| encoder | top-1, converged | top-1, 2022 probe | kNN | queries | seconds to make |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = " | ".join(f"{row[key]:.1f} %" for key in ("top1_converged", "top1", "knn"))
        lines.append(f"| {row['name']} | {figures} | {row['queries']:,} | {row['made_in']:.0f} |")
    return "\n".join(lines)


def neighbours(checkpoint: str, images: torch.Tensor, queries: int = 5, shown: int = 6) -> torch.Tensor:
    """Indices (queries, shown) of the images nearest by cosine to the first ones, each first, by one encoder."""
    h = F.normalize(represent(load_encoder(checkpoint), images), dim=1)
    return (h[:queries] @ h.T).topk(shown, dim=1).indices


def picture(rows: list[dict], path: Path) -> None:
    """Accuracy bars, and what victim and copies hold for similar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    images, _ = load_dataset("shapes", split="test")
    images = images[-1000:]
    encoders = [row for row in rows if row["checkpoint"]]
    figure, axes = pyplot.subplots(1, 1 + len(encoders), figsize=(4 + 4 * len(encoders), 3.8), layout="constrained")
    names, values = [row["name"] for row in rows], [row["top1_converged"] for row in rows]
    bars = axes[0].bar(names, values, color=["tab:blue", "tab:orange", "tab:red", "tab:gray"])
    axes[0].bar_label(bars, fmt="%.1f")
    axes[0].set_ylabel("top-1 accuracy, converged linear probe (%)")
    axes[0].tick_params(axis="x", labelrotation=20)
    for axis, row in zip(axes[1:], encoders, strict=True):
        strip = images[neighbours(row["checkpoint"], images)]  # (queries, shown, 3, 32, 32)
        strip = F.pad(strip, (1, 1, 1, 1), value=255).permute(0, 3, 1, 4, 2)
        axis.imshow(strip.reshape(strip.shape[0] * 34, -1, 3).numpy())
        axis.set_title(f"{row['name']}: an image and its nearest five")
        axis.axis("off")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


@script
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="folder for runs, table and picture")
    out = parser.parse_args().out
    started = time.perf_counter()
    shutil.rmtree(out / "runs", ignore_errors=True)
    rows = run_everything(out / "runs")
    text = table(rows)
    picture(rows, out / "demo.png")
    with atomic_path(out / "table.md") as temporary:
        temporary.write_text(text + "\n")
    print(f"\n{text}\n\npicture: {out / 'demo.png'}; all in {time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    main()
