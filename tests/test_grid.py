"""Experiments: which runs a file of experiments/ asks for, and what is said of a file that is none."""

import importlib
from pathlib import Path

import pytest
import yaml

from experiments.grid import Grid
from experiments.report import PARTS, check
from tests.conftest import ROOT
from utils import UserError

SHIPPED = sorted(path for path in (ROOT / "experiments").glob("*.yaml") if path.stem != "scales")
TINY = {
    "axes": {
        "attack": {
            "direct": "",
            "own": {"text": "--attack own-simclr {own_flags}", "only": {"defence": ["none"]}},
            "untrained": {"text": "", "victim": "--epochs 0"},
        },
        "defence": {"none": "", "noise": {"text": "--defence noise --sigma", "values": [0.5, 1]}},
        "seed": "{seeds}",
    },
    "scales": {"demo": {"data": "shapes", "own_flags": "--epochs 3", "seeds": [0, 1]}, "small": {"seeds": [0]}},
    "steps": {
        "victim": "run.py --dataset {data} {attack.victim}",
        "copy": "steal.py --victim {victim} {attack} {defence} --seed {seed}",
        "judged": "linear_eval.py --stolen {copy}",
        "proof": {"run": "verify.py --victim {victim} --suspect {copy*}", "without": {"attack": ["own"]}},
    },
    "table": {"of": "judged", "lines": ["attack", "defence"], "columns": {"accuracy": "judged.top1_converged"}},
}


@pytest.fixture
def write(tmp_path):
    def file(**changes):
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False))
        return path

    return file


def grid_of(path, scale="demo"):
    return Grid(path, scale, Path("runs"), PARTS)


@pytest.mark.parametrize("scale", ["demo", "small", "full"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_commands_of_what_is_shipped_are_those_of_the_scripts(path, scale):
    grid = grid_of(path, scale)
    check(grid)
    cells = grid.unique()
    assert cells
    # One of each step and value: their flags are in all the others.
    seen = set()
    for cell in cells:
        new = {(cell.step, *pair) for pair in cell.at} - seen
        if new or not cell.at:
            importlib.import_module(Path(cell.words[0]).stem).parse(cell.words[1:])
        seen |= new


def test_a_step_is_run_at_each_value_of_the_axes_that_it_depends_on(write):
    grid = grid_of(write())
    assert grid.steps["victim"].axes == ("attack",)
    assert grid.steps["copy"].axes == ("attack", "defence", "seed")
    assert grid.steps["proof"].axes == ("attack",)
    assert len(grid.cells["copy"]) == (3 + 1 + 3) * 2, "the attacker's own encoder meets no defence"
    assert len(grid.cells["judged"]) == len(grid.cells["copy"])
    words = [" ".join(cell.words) for cell in grid.cells["copy"].values()]
    assert sum("--attack own-simclr --epochs 3 --seed" in line for line in words) == 2
    assert sum("--defence noise --sigma 0.5" in line for line in words) == 4


def test_points_with_the_same_command_share_a_run(write):
    grid = grid_of(write())
    victims = grid.cells["victim"]
    assert len({cell.folder for cell in victims.values()}) == 2, "only the untrained victim is another"
    assert victims[("attack", "direct"),] is victims[("attack", "own"),]
    assert len(grid.unique()) == len({cell.folder for cell in grid.unique()})


def test_a_run_comes_after_those_that_it_needs(write):
    done = set()
    for cell in grid_of(write()).unique():
        assert {need.folder for need in cell.needs} <= done
        assert all(str(need.folder) in cell.words for need in cell.needs)
        done.add(cell.folder)


def test_a_star_is_every_run_that_agrees_but_those_that_the_step_leaves_out(write):
    grid = grid_of(write())
    proof = grid.cells["proof"][("attack", "direct"),]
    copies = [cell for at, cell in grid.cells["copy"].items() if dict(at)["attack"] == "direct"]
    assert [need for need in proof.needs if need.step == "copy"] == copies
    assert (("attack", "own"),) not in grid.cells["proof"]


def test_folders_depend_on_the_command_alone(write, tmp_path):
    before = [cell.folder for cell in grid_of(write()).unique()]
    steps = {"another": "run.py --dataset textures", **TINY["steps"]}
    after = [cell.folder for cell in grid_of(write(steps=steps)).unique()]
    assert set(before) < set(after)


def test_an_entry_of_the_scale_may_name_a_step_or_a_file(write):
    """Where a scale has no run to begin with, but an encoder from elsewhere."""
    steps = {"victim": "{victim_run}", "copy": "steal.py --victim {source} --seed {seed}"}
    scales = {
        "demo": {"victim_run": "run.py", "source": "{victim}", "own_flags": "", "seeds": [0]},
        "full": {"victim_run": "linsimsiam.py", "source": "a.pth.tar", "own_flags": "", "seeds": [0]},
    }
    changes = {"steps": steps, "scales": scales, "table": {**TINY["table"], "of": "copy", "lines": ["seed"]}}
    demo, full = (grid_of(write(**changes), scale).unique() for scale in ("demo", "full"))
    assert [cell.words[0] for cell in demo] == ["run.py", "steal.py"]
    assert demo[1].needs == [demo[0]]
    assert demo[1].words[2] == str(demo[0].folder)
    assert full[1].words[2] == "a.pth.tar"
    assert full[1].needs == []


def test_scales_beside_the_file_are_joined_with_its_own(write, tmp_path):
    (tmp_path / "scales.yaml").write_text("demo: {data: cifar10, own_flags: --epochs 9}\nfull: {seeds: [0]}\n")
    demo = grid_of(write(scales={"demo": {"seeds": [0], "own_flags": "--epochs 3"}})).scale
    assert demo == {"data": "cifar10", "own_flags": "--epochs 3", "seeds": [0]}
    with pytest.raises(UserError, match="scale 'huge': give --scale demo or full"):
        grid_of(tmp_path / "tiny.yaml", "huge")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"axis": {}}, "'axis' is unknown: did you mean 'axes'"),
        ({"axes": None}, "axes is not a mapping"),
        ({"axes": {"seed": 5}}, "axis 'seed' is 5, neither"),
        ({"axes": {**TINY["axes"], "seed": "{sedes}"}}, "axis 'seed' is '{sedes}': give a list"),
        ({"axes": {**TINY["axes"], "seed": []}}, "axis 'seed' has no value"),
        ({"axes": {**TINY["axes"], "seed": [1, 1]}}, "axis 'seed' has no value, or one twice"),
        ({"axes": {**TINY["axes"], "attack": {"direct": None}}}, "'direct' is None, not a text"),
        ({"axes": {**TINY["axes"], "defence": {"noise": {"text": "x", "values": 3}}}}, "'noise' has values 3"),
        (
            {"axes": {**TINY["axes"], "attack": {"own": {"text": "", "only": {"defence": ["noise 5"]}}}}},
            "axis 'attack', 'own', only, defence: 'noise 5' is unknown: did you mean 'noise 0.5'",
        ),
        (
            {"axes": {**TINY["axes"], "attack": {"own": {"text": "", "only": {"defense": ["none"]}}}}},
            "only: 'defense' is unknown: did you mean 'defence'",
        ),
        ({"table": {**TINY["table"], "columns": {"a": "judged"}}}, "'judged' names no figure: give judged.NAME"),
        ({"axes": {**TINY["axes"], "data": [1]}}, "data: an axis, a step and an entry of the scale need names"),
        ({"steps": {"victim": 3}}, "step 'victim' is 3, not a text or a mapping: give run, without"),
        ({"steps": {"victim": {"runs": "x"}}}, "'runs' is unknown: did you mean 'run'"),
        ({"steps": {"victim": "run.py {dat}"}}, "step 'victim': 'dat' is unknown: did you mean 'data'"),
        ({"steps": {"victim": "run.py {data*}"}}, "step 'victim': 'data' is unknown"),
        ({"steps": {"victim": "run.py {victim}"}}, "step 'victim': 'victim' is unknown"),
        ({"steps": {"victim": "run.py --dataset 'shapes"}}, "step 'victim': no closing quotation"),
        ({"steps": {"victim": ""}}, "step 'victim' is empty"),
        ({"steps": {"victim": "run.py --seed {seeds}"}}, "{seeds} is \\[0, 1\\]: make it an axis"),
        (
            {"steps": {**TINY["steps"], "proof": {"run": "verify.py {copy*}", "without": {"attak": ["own"]}}}},
            "without: 'attak' is unknown: did you mean 'attack'",
        ),
        (
            {"steps": {**TINY["steps"], "proof": {"run": "verify.py {copy*}", "without": {"attack": ["ow"]}}}},
            "without, attack: 'ow' is unknown: did you mean 'own'",
        ),
        ({"table": {"of": "judged", "lines": ["attack"]}}, "table has no columns"),
        ({"table": {**TINY["table"], "lines": ["colour"]}}, "give a step, and axes that it depends on"),
        (
            {"table": {**TINY["table"], "columns": {"a": "juged.top1"}}},
            "column 'a', STEP.NAME 'juged.top1': 'juged' is unknown: did you mean 'judged'",
        ),
        ({"table": {**TINY["table"], "columns": {"a": {"of": "judged.top1", "best": "most"}}}}, "give max or min"),
        (
            {"table": {**TINY["table"], "columns": {"a": {"of": "judged.top1", "to": {"defence": "nine"}}}}},
            "to, defence: 'nine' is unknown: did you mean 'none'",
        ),
        ({"pictures": {"a": {"kind": "pie"}}}, "of kind 'pie': give curve, heat, sides"),
        ({"pictures": {"a": {"kind": "heat", "x": "attack", "y": "defence"}}}, "picture 'a' has no of"),
        ({"claims": [{"claim": "x", "of": "judged.knn"}]}, "claim 1 has no more"),
        (
            {"claims": [{"claim": "x", "of": "judged.knn", "more": {"attack": "none"}}]},
            "claim 1, more, attack: 'none' is unknown",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_with_the_nearest_right_word(write, changes, said):
    with pytest.raises(UserError, match=said) as error:
        check(grid_of(write(**changes)))
    assert "tiny.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_without_a_part_or_that_is_none_is_named(write, tmp_path):
    half = {name: part for name, part in TINY.items() if name != "steps"}
    (tmp_path / "half.yaml").write_text(yaml.safe_dump(half))
    with pytest.raises(UserError, match="has no steps"):
        grid_of(tmp_path / "half.yaml")
    with pytest.raises(UserError, match="is not a file"):
        grid_of(tmp_path / "none.yaml")


ATTACK_TABLES = {"attacks", "architectures", "budgets", "defences", "heads", "losses", "queries-to-clones"}
ATTACK_TABLES |= {"adaptive", "query-sets", "released-vs-standard"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_table_of_attacks_has_both_controls(path):
    grid = grid_of(path)
    copies = [" ".join(cell.words) for cell in grid.cells.get("copy", {}).values()]
    untrained = [str(cell.folder) for cell in grid.unique() if cell.step == "victim" and "--epochs 0" in cell.command]
    own = any("--attack own-simclr" in words for words in copies)
    of_untrained = any(f"--victim {victim} " in words for words in copies for victim in untrained)
    assert own == of_untrained == (path.stem in ATTACK_TABLES)
