"""What a file of experiments/ asks for: axes, steps, and a cell for each step at each value of its axes.

    axes:                                      # what is varied
      loss: [mse, infonce]
      defence: {none: "", noise: {values: [0.5, 1], text: --defence noise --mu 0 --sigma}}
      seed: "{seeds}"                          # the list of that name in the scale
    scales:                                    # beside those of scales.yaml
      demo: {data: shapes, epochs: 4, seeds: [0]}
    steps:                                     # a script each, and its flags
      victim: run.py --dataset {data} --epochs {epochs}
      copy: steal.py --victim {victim} --losstype {loss} {defence} --seed {seed}
      judged: linear_eval.py --modeltype stolen --stolen {copy}
      proof: {run: "verify.py --method watermark --victim {victim} --suspect {copy*}", without: {loss: [mse]}}

In a step, {name} is the text of an axis's value, an entry of the scale, or the run of another step, which an entry may
name too; {name*} are all runs of a step. A step depends on the axes that its text names and on those of the steps that
it names, unless by {*}.
"""

import hashlib
import itertools
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.parts import part_of, refuse_unknown
from files.reading import Check, checked, list_of, read_yaml, table, text
from utils import UserError

_NAME = re.compile(r"\{(\w+)(?:\.(\w+))?(\*?)\}")
_SCALAR = (str, int, float)
_PARTS: dict[str, Check] = {"about": text(), "axes": table(), "scales": table(table()), "steps": table()}
_STEP: dict[str, Check] = {"run": text(), "without": table(list_of(text()))}

At = tuple[tuple[str, str], ...]  # (axis, name of its value), in the order of the axes


@dataclass(frozen=True)
class Value:
    """A value of an axis: its name, its texts by the part of a name after the dot, and where it does not occur.

    only: the values of other axes with which it is combined; of axes that are not named, all. family, strength: the
    entry of the file that it belongs to, and which of that entry's `values` it is, if it has several.
    """

    name: str
    texts: Mapping[str, str]
    only: Mapping[str, Sequence[str]] = field(default_factory=dict)
    family: str = ""
    strength: str = ""


@dataclass(frozen=True)
class Step:
    """A script with its flags, the axes that it depends on, and values of axes at which it is not run.

    judges: the first of the steps of which it takes all runs, such as the copies that are its suspects.
    """

    name: str
    run: str
    axes: tuple[str, ...]
    without: Mapping[str, Sequence[str]]
    judges: str = ""


@dataclass(eq=False)
class Cell:
    """A run: a step at a value of each of its axes, the first of those that give the same command.

    words: script and flags, with the folder of the run. needs: the cells whose runs stand in the words.
    """

    step: str
    at: At
    folder: Path
    words: list[str]
    needs: list["Cell"] = field(default_factory=list)

    def __str__(self) -> str:
        return " ".join([self.step, *(f"{axis}={name}" for axis, name in self.at)])

    @property
    def command(self) -> str:
        return f"python {shlex.join(self.words)}"


class Grid:
    """The cells of a file at a scale, whose runs are below `runs`. UserError for a file that is none."""

    def __init__(self, path: Path, scale: str, runs: Path, also: Mapping[str, Check]):
        """also: the checks of the parts of the file that say how the results are read."""
        content = read_yaml(path, "an experiment, a file of YAML")
        self.path, self.name, self.runs = path, path.stem, runs
        self.content = content = part_of(content, {**_PARTS, **also}, str(path), needed=("axes", "steps"))
        self.scale = self._scale(scale, content.get("scales", {}))
        names = [*content["axes"], *content["steps"], *self.scale]
        if len(set(names)) < len(names):
            twice = ", ".join(sorted({str(name) for name in names if names.count(name) > 1}))
            raise UserError(f"{path}: {twice}: an axis, a step and an entry of the scale need names of their own")
        self.axes = {name: self._values(name, value) for name, value in content["axes"].items()}
        for axis, values in self.axes.items():
            for value in values:
                self.check_values(value.only, f"{path}: axis {axis!r}, {value.name!r}, only")
        self.steps: dict[str, Step] = {}
        for name, value in content["steps"].items():
            self.steps[name] = self._step(name, value)
        self.cells: dict[str, dict[At, Cell]] = {}
        self._made: dict[str, Cell] = {}
        for step in self.steps.values():
            self.cells[step.name] = {at: self._cell(step, at) for at in self._points(step)}

    def unique(self) -> list[Cell]:
        """Each cell once, after those that it needs."""
        return list(self._made.values())

    def where(self, step: str, at: Mapping[str, str]) -> Cell | None:
        """The cell of a step at the values that `at` has for the step's axes; None where the experiment has none."""
        axes = self.steps[step].axes
        return self.cells[step].get(tuple((axis, at[axis]) for axis in axes if axis in at))

    def check_axes(self, axes: Iterable[str], where: str) -> None:
        """UserError for what is no axis."""
        for axis in axes:
            refuse_unknown(axis, self.axes, where)

    def check_values(self, names: Mapping[str, Any], where: str) -> None:
        """UserError for values, or lists of values, that these axes do not have."""
        self.check_axes(names, where)
        for axis, chosen in names.items():
            for name in chosen if isinstance(chosen, list) else [chosen]:
                refuse_unknown(name, [value.name for value in self.axes[axis]], f"{where}, {axis}")

    def check_figure(self, figure: str, where: str) -> None:
        """UserError for what is no STEP.NAME of a figure in the rows of a step."""
        step, _, name = figure.partition(".")
        refuse_unknown(step, self.steps, f"{where}, STEP.NAME {figure!r}")
        if not name:
            raise UserError(f"{where}: {figure!r} names no figure: give {figure}.NAME")

    # ---- the file's parts ----

    def _scale(self, scale: str, own: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The entries of a scale: those of `scales.yaml` beside the file, and the file's own, which come first."""
        beside = self.path.parent / "scales.yaml"
        common = read_yaml(beside, "scales, a file of YAML") if beside.exists() else {}
        checked(common, dict.fromkeys(common, table()), str(beside))
        known = list(dict.fromkeys([*common, *own]))
        if scale not in known:
            raise UserError(f"{self.path} has no scale {scale!r}: give --scale {' or '.join(known)}")
        return {**common.get(scale, {}), **own.get(scale, {})}

    def _values(self, axis: str, declared: Any) -> list[Value]:
        """The values of an axis: a list of scalars, a mapping from names to texts, or the name of a scale's list."""
        where = f"{self.path}: axis {axis!r}"
        if isinstance(declared, str):
            name = _NAME.fullmatch(declared)
            if not name or not isinstance(self.scale.get(name[1]), list):
                raise UserError(f"{where} is {declared!r}: give a list, a mapping, or {{NAME}} of a list of the scale")
            declared = self.scale[name[1]]
        if isinstance(declared, list) and all(isinstance(value, _SCALAR) for value in declared):
            values = [Value(str(value), {"": str(value)}, family=str(value)) for value in declared]
        elif isinstance(declared, Mapping):
            values = [one for name, value in declared.items() for one in _named(str(name), value, where)]
        else:
            raise UserError(f"{where} is {declared!r}, neither a list of numbers and words nor a mapping")
        if not values or len({value.name for value in values}) < len(values):
            raise UserError(f"{where} has no value, or one twice: name each once")
        return values

    def _step(self, name: str, declared: Any) -> Step:
        where = f"{self.path}: step {name!r}"
        declared = part_of(declared, _STEP, where, needed=("run",), text_is="run")
        run = self.with_entries(declared["run"], where)
        found, judged = set(), []
        for known, _, star in _NAME.findall(run):
            refuse_unknown(known, self.steps if star else [*self.axes, *self.scale, *self.steps], where)
            found |= set() if star else self._axes_of(known)
            judged += [known] if star else []
        without = declared.get("without", {})
        self.check_values(without, f"{where}, without")
        axes = tuple(axis for axis in self.axes if axis in found)
        return Step(name, run, axes, without, *judged[:1])

    def _axes_of(self, name: str) -> set[str]:
        return set(self.steps[name].axes) if name in self.steps else {name} & self.axes.keys()

    # ---- cells ----

    def _points(self, step: Step) -> Iterable[At]:
        for values in itertools.product(*(self.axes[axis] for axis in step.axes)):
            names = {axis: value.name for axis, value in zip(step.axes, values, strict=True)}
            wanted = all(names[axis] not in out for axis, out in step.without.items() if axis in names)
            fit = all(names[axis] in only for value in values for axis, only in value.only.items() if axis in names)
            if wanted and fit:
                yield tuple(names.items())

    def _cell(self, step: Step, at: At) -> Cell:
        """The cell of a step at a point, or the earlier one that has the same command."""
        names, needs = dict(at), []

        def text_of(match: re.Match) -> str:
            name, part, star = match.groups()
            if name in self.steps:
                cells = self._runs_of(name, names, step, bool(star))
                needs.extend(cells)
                return shlex.join(str(cell.folder) for cell in cells)
            value = next(value for value in self.axes[name] if value.name == names[name])
            return self.with_entries(value.texts.get(part or "", ""), f"{self.path}: axis {name!r}", whole=True)

        line = _NAME.sub(text_of, step.run)
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise UserError(f"{self.path}: step {step.name!r}: {str(error).lower()}: {line[:80]}") from None
        if not words:
            raise UserError(f"{self.path}: step {step.name!r} is empty: give a script and its flags")
        command = shlex.join(words)
        if command not in self._made:
            # By its command: experiments that need the same run, such as the same victim, share it. Without the root of
            # the runs, so that it may be moved.
            digest = hashlib.sha256(command.replace(f"{self.runs}/", "").encode()).hexdigest()[:10]
            folder = self.runs / f"{Path(words[0]).stem}-{digest}"
            whole = [*words, "--checkpoint-dir", str(self.runs), "--run-dir", str(folder), "--resume"]
            self._made[command] = Cell(step.name, at, folder, whole, list(dict.fromkeys(needs)))
        return self._made[command]

    def with_entries(self, line: str, where: str, whole: bool = False) -> str:
        """A text with the scale's entries in the place of their names; whole: it may have no other names."""

        def text_of(match: re.Match) -> str:
            name, _, star = match.groups()
            if not whole and (star or name not in self.scale):
                return match[0]
            refuse_unknown(name, self.scale, where)
            if not isinstance(self.scale[name], _SCALAR):
                raise UserError(f"{where}: {{{name}}} is {self.scale[name]!r}: make it an axis")
            return str(self.scale[name])

        return _NAME.sub(text_of, line)

    def _runs_of(self, name: str, names: Mapping[str, str], step: Step, every: bool) -> list[Cell]:
        """The cells of a step that agree with the values in `names`: the only one, or every one."""
        if every:
            left_out = [(axis, value) for axis, values in step.without.items() for value in values]
            fitting = [
                cell
                for at, cell in self.cells[name].items()
                if all(names.get(axis, value) == value for axis, value in at) and not set(at) & set(left_out)
            ]
            found = list(dict.fromkeys(fitting))
        else:
            found = [cell for cell in [self.where(name, names)] if cell]
        if not found:
            raise UserError(
                f"{self.path}: step {step.name!r} at {names} needs a run of {name!r}, which is left out there"
            )
        return found


def _named(name: str, declared: Any, where: str) -> list[Value]:
    """The values that an entry of a mapping stands for: a text, texts by name, or a text with several strengths."""
    if isinstance(declared, _SCALAR):
        return [Value(name, {"": str(declared)}, family=name)]
    if not isinstance(declared, Mapping):
        raise UserError(f"{where}: {name!r} is {declared!r}, not a text or a mapping of texts")
    only, strengths = declared.get("only", {}), declared.get("values")
    checked({"only": only}, {"only": table(list_of(text()))}, f"{where}: {name!r}")
    texts = {("" if part == "text" else str(part)): entry for part, entry in declared.items()}
    texts = {part: str(entry) for part, entry in texts.items() if part not in ("only", "values")}
    if strengths is None:
        return [Value(name, texts, only, name)]
    if not isinstance(strengths, list) or not all(isinstance(strength, _SCALAR) for strength in strengths):
        raise UserError(f"{where}: {name!r} has values {strengths!r}, not a list of numbers")
    flags = texts.get("", "")
    return [Value(f"{name} {one}", {**texts, "": f"{flags} {one}"}, only, name, str(one)) for one in strengths]
