"""What run.sh asks of the jobs it ran: whether each went on where it had stopped, and whether anything is missing.

python slurm/test/check.py jobs FOLDER                       the table; exit code 1 and what is missing
python slurm/test/check.py epochs-in SECONDS IMAGES ROOT     so many epochs take so long, by the speed of the runs there
"""

import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

NO_TASK = "4294967294"  # what %a is in the name of an output file when the job is no array


@dataclass
class Job:
    """A job, or one task of an array: what Slurm knows of it, what it printed, and what its run left."""

    name: str
    state: str
    restarts: int
    preempted: bool
    output: str
    checkpoint: dict = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def ask(self, condition: object, what: str) -> None:
        if not condition:
            self.missing.append(f"{self.name}: {what}")

    @property
    def stops(self) -> list[tuple[str, str]]:
        """(where it stopped and saved, by which signal)."""
        return re.findall(r"^(?:.*: )?stopped (.*?) by (SIG\w+)", self.output, re.MULTILINE)

    @property
    def resumes(self) -> list[str]:
        """Where it went on."""
        return re.findall(r"^resumed (.*)$", self.output, re.MULTILINE)

    @property
    def epochs(self) -> Counter:
        """How often each epoch was finished."""
        return Counter(map(int, re.findall(rf"^epoch (\d+)/{self.wanted}  loss", self.output, re.MULTILINE)))

    @property
    def wanted(self) -> int:
        return self.checkpoint.get("settings", {}).get("epochs", 0)

    def ask_whole(self) -> None:
        """That it is finished, each epoch once, however often it was stopped."""
        self.ask(self.state == "COMPLETED", f"ended as {self.state}")
        self.ask(self.checkpoint.get("epoch") == self.wanted > 0, "its checkpoint is not of the last epoch")
        self.ask("begun" not in self.checkpoint, "its checkpoint is of the middle of an epoch")
        self.ask(self.epochs == Counter(range(1, self.wanted + 1)), f"epochs other than once each: {dict(self.epochs)}")
        self.ask(len(self.resumes) == len(self.stops), f"stopped {len(self.stops)} times, resumed {len(self.resumes)}")


def read_jobs(folder: Path) -> dict[str, Job]:
    """The jobs by their numbers, such as 3 or 4_1."""
    log = (folder / "cluster" / "slurmctld.log").read_text()
    # JobId=3, or of an array JobId=4_1(5)
    preempted = set(re.findall(r"preemption grace time for JobId=(\w+)", log))
    jobs = {}
    for line in (folder / "jobs").read_text().splitlines():
        known = dict(re.findall(r"(\w+)=(\S*)", line))
        number, task = known.get("ArrayJobId", known["JobId"]), known.get("ArrayTaskId")
        called = number if task is None else f"{number}_{task}"
        file = folder / f"{known['JobName']}-{number}_{task or NO_TASK}.out"
        if known["JobName"] != "urgent":
            output = file.read_text() if file.exists() else ""
            name = known["JobName"] if task is None else f"{known['JobName']} {task}"
            jobs[called] = Job(name, known["JobState"], int(known["Restarts"]), called in preempted, output)
    return jobs


def find_checkpoint(job: Job) -> dict:
    """The checkpoint that a job says it wrote; empty if it says none."""
    paths = re.findall(r"^(?:victim|copy): (\S+\.pth\.tar)$", job.output, re.MULTILINE)
    return torch.load(paths[-1], weights_only=True) if paths else {}


def queries_in(checkpoint: dict) -> int | None:
    """What the victim's ledger in a copy's checkpoint says."""
    return sum(account["queries"] for account in checkpoint["ledger"].values()) if "ledger" in checkpoint else None


def check(job: Job, rows: list[dict]) -> list[dict]:
    """Note what is missing of a job; returns its rows."""
    kind = job.name.split()[0]
    if kind == "cancelled":
        job.ask(job.state == "CANCELLED" and job.restarts == 0, f"is {job.state} after {job.restarts} restarts")
        return []
    if kind == "judged":
        found = [row for row in rows if row["model"] == "victim"]
        job.ask(job.state == "COMPLETED" and len(found) == 1, f"ended as {job.state} with {len(found)} rows")
        return found
    job.checkpoint = find_checkpoint(job)
    job.ask_whole()
    settings = job.checkpoint.get("settings", {})
    if kind != "victim":
        spent = queries_in(job.checkpoint)
        job.ask(spent == settings.get("num_queries"), f"{spent} queries in its ledger")
    if kind in ("victim", "imagenet"):
        job.ask(job.preempted and job.restarts and job.resumes, "was not preempted, requeued and resumed")
    if kind == "limited":
        job.ask(job.restarts and "SIGUSR1" in dict(map(reversed, job.stops)), "was not warned and requeued")
    if kind not in ("array", "imagenet"):
        return []
    cell = [settings.get(name) for name in ("losstype", "num_queries", "seed")]
    found = [row for row in rows if [row["losstype"], row["queries"], row["seed"]] == cell and row["model"] == "stolen"]
    job.ask(len(found) == 1, f"{len(found)} rows of {cell} in results.jsonl")
    return found


def show(jobs: dict[str, Job], rows: dict[str, list[dict]]) -> None:
    """The table."""
    line = "{:5} {:10} {:22} {:10} {:9} {:8} {:18} {:7} {:7} {:5}"
    head = ("job", "name", "run", "state", "preempted", "restarts", "resumed after", "epochs", "queries", "top1")
    print(line.format(*head).rstrip())
    for number, job in jobs.items():
        settings, found = job.checkpoint.get("settings", {}), rows[number]
        run = [settings.get("losstype"), settings.get("num_queries") or "victim", f"seed {settings.get('seed')}"]
        print(
            line.format(
                number,
                job.name,
                " ".join(map(str, run)) if settings else "",
                job.state.lower(),
                "yes" if job.preempted else "",
                job.restarts or "",
                "; ".join(where.removeprefix("after ") for where in job.resumes),
                f"{job.checkpoint['epoch']}/{job.wanted}" if job.checkpoint else "",
                found[0]["queries"] if found else queries_in(job.checkpoint) or "",
                f"{found[0].get('top1_converged', found[0]['top1']):.1f}" if found else "",
            ).rstrip()
        )


def judge(folder: Path) -> int:
    """Check all jobs of the folder and show them; the exit code."""
    jobs = read_jobs(folder)
    results = folder / "checkpoints" / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    found = {number: check(job, rows) for number, job in jobs.items()}
    show(jobs, found)
    missing = [text for job in jobs.values() for text in job.missing]
    kinds = Counter(job.name.split()[0] for job in jobs.values())
    cells = 1
    for name in ("LOSSES", "BUDGETS", "SEEDS"):
        cells *= len(os.environ[name].split())
    if kinds != {"victim": 1, "array": cells, "imagenet": 1, "limited": 1, "cancelled": 1, "judged": 1}:
        missing.append(f"jobs other than expected: {dict(kinds)}")
    array = [job for job in jobs.values() if job.name.startswith("array")]
    if not any(job.preempted and job.restarts and job.resumes for job in array):
        missing.append("no task of the array was preempted, requeued and resumed")
    if len(rows) != cells + 2:
        missing.append(f"{len(rows)} rows in results.jsonl instead of {cells + 2}")
    print("\n".join(f"MISSING  {text}" for text in missing) or f"all there: {len(jobs)} jobs, {len(rows)} rows")
    return int(bool(missing))


def epochs_in(seconds: float, images: int, root: Path) -> int:
    """How many epochs of so many images a copy is trained in that time, by the fastest epoch of those below `root`."""
    lines = [line for file in root.rglob("stolen-*/metrics.jsonl") for line in file.read_text().splitlines()]
    speeds = [record["images_per_second"] for record in map(json.loads, lines) if "images_per_second" in record]
    return max(2, round(seconds * max(speeds) / images))


if __name__ == "__main__":
    if sys.argv[1] == "epochs-in":
        print(epochs_in(float(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
    else:
        sys.exit(judge(Path(sys.argv[2])))
