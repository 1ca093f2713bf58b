"""What the documents print can be typed: every command line of theirs is taken by its script."""

import importlib
import importlib.util
import re
import shlex

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "slurm" / "README.md"]
# An indented line of code that starts a script, by itself or under a launcher.
SCRIPT = re.compile(r"^ {4,}(?:srun .*?python |torchrun .*?|python )(\w+)\.py(?: (.*))?$", re.MULTILINE)
MODULE = re.compile(r"python -m ([\w.]+)")
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#\S*)?\)")
LINES = sorted(
    {
        (script, line)
        for page in PAGES
        if page.name != "extending.md"  # tests/test_extending.py runs its examples
        for script, line in SCRIPT.findall(page.read_text())
        if "$" not in line and "[" not in line  # those with a shell's variables, or with a choice of words
    }
)


def words_of(line):
    return shlex.split(line, comments=True)


def prose(page):
    """The lines of a page, numbered, that are neither tables nor code."""
    text = re.sub(r"^```.*?^```$", lambda code: "\n" * code[0].count("\n"), page.read_text(), flags=re.S | re.M)
    lines = enumerate(text.splitlines(), 1)
    return [(number, line) for number, line in lines if not line.startswith(("|", "    "))]


@pytest.mark.parametrize(("script", "line"), [(script, line) for script, line in LINES if words_of(line)])
def test_every_command_is_taken_by_its_script(script, line):
    importlib.import_module(script).parse(words_of(line))


def test_the_commands_of_every_script_are_there():
    shown = {script for script, _ in LINES}
    scripts = {"run", "steal", "stealhead", "steallabels", "linear_eval", "stealsimsiam", "linsimsiam"}
    assert scripts | {"legitimate", "verify", "detect", "reproduce"} <= shown


def test_launchers_are_among_the_commands():
    text = "\n".join(page.read_text() for page in PAGES)
    launched = re.findall(r"^    (torchrun|srun) .*?(\w+\.py) ", text, re.MULTILINE)
    assert {launcher for launcher, _ in launched} == {"torchrun", "srun"}
    assert {(f"{script}.py") for script, _ in LINES} >= {script for _, script in launched}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_speaks_of_what_is_there(page):
    text = page.read_text()
    assert not [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    assert not [name for name in MODULE.findall(text) if name != "venv" and not importlib.util.find_spec(name)]
    scripts = re.findall(r"`(?:python )?(\w+\.py)\b", text) + re.findall(r"\bpython (\w+\.py)\b", text)
    inside = {path.name for path in ROOT.glob("*/*.py")}  # a page may call a module by its name alone
    assert not [name for name in scripts if not (ROOT / name).exists() and name not in inside]
    files = re.findall(r"`((?:\w+/)+\w+\.(?:py|md|yaml|sh|sbatch))\b", text)
    assert not [name for name in files if not (ROOT / name).exists() and not name.startswith("defenses/clip")]


def test_the_experiments_that_scripts_and_pages_name_are_there():
    sources = [*PAGES, ROOT / "Makefile", *ROOT.glob("*.py"), *(ROOT / "experiments").glob("*.py")]
    named = {name for source in sources for name in re.findall(r"experiments/[\w-]+\.yaml", source.read_text())}
    assert "experiments/defences.yaml" in named
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_lines_of_a_page_are_short(page):
    assert not [(number, line) for number, line in prose(page) if len(line) > 120]


def test_the_readme_is_short_and_in_order():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 10_000
    order = [
        *(
            "| CIFAR-10, three victims | top-1",
            "## Install",
            "a laptop",
            "one GPU",
            "a cluster",
            "## Three scripts",
            "## From Python",
        ),
        *(
            "## Attacks",
            "## Defences",
            "## Is it stolen?",
            "## Attack an API",
            "## Where to read",
            "## File map",
            "## Limits",
            "## Citation",
        ),
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_every_page_is_named_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert not [page.name for page in PAGES[1:] if str(page.relative_to(ROOT)) not in text]


def test_the_file_map_names_every_module_and_folder():
    page = (ROOT / "README.md").read_text()
    map_ = page[page.index("## File map") : page.index("## Limits")]
    assert not [path.name for path in ROOT.glob("*.py") if not re.search(rf"\b{re.escape(path.name)}\b", map_)]
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    folders |= {"docs", "slurm"}
    assert not [name for name in folders if f" {name}/ " not in map_]
    assert not [name for name in re.findall(r"[\w.]+\.py", map_) if not (ROOT / name).exists()]
    assert set(re.findall(r" (\w+)/ ", map_)) == folders
