"""Lists what is there: the victims, the copies below them and their results, newest last.

python runs.py
"""

from dataclasses import dataclass
from pathlib import Path

import jobs.early  # noqa: F401

from files.reading import read_lines
from jobs.ending import script
from settings import Parser, Settings, setting
from training.finding import runs_below
from training.run import as_row, relative
from utils import UserError


@dataclass(frozen=True)
class Listing(Settings):
    checkpoint_dir: Path = setting(Path("checkpoints"), "root of all runs")


@script
def main() -> None:
    root = Parser(__doc__, [Listing]).parse().use(Listing).checkpoint_dir
    results = root / "results.jsonl"
    rows = read_lines(results) if results.exists() else []
    found = runs_below(root)
    if not found:
        raise UserError(f"no runs in {root}: python run.py trains a victim, or give --checkpoint-dir DIR")
    parents = [path for path in found if not any(above.parent in path.parent.parents for above in found)]
    for path in parents:
        for run in (path, *(copy for copy in found if path.parent in copy.parent.parents)):
            print(f"{'' if run is path else '    '}{relative(run.parent) if run is path else run.parent.name}")
            # By the end of its path: the folder of all runs may have been moved.
            place = run.relative_to(root).parts
            for row in rows:
                if Path(str(row.get("checkpoint"))).parts[-len(place) :] == place:
                    print(f"        {as_row(row)}")


if __name__ == "__main__":
    main()
