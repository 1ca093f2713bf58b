"""The tensors of a file: where they are, without wrappers' prefixes, compared with a network's and loaded into it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from files.reading import dense
from utils import UserError

State = dict[str, Tensor]

# Entries that may hold the tensors, one in another too; the first that does counts, so of DINO's two networks the
# teacher is read.
ENTRIES = ("state_dict", "teacher", "model", "student", "model_state_dict", "net", "network", "model_ema")
ENTRIES += ("encoder", "backbone", "classy_state_dict", "base_model", "trunk")
# Entries that may say how images are prepared.
ASSUMED = ("normalize", "input_size")
# Prefixes that wrappers put before every key.
WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Tensors:
    """A file's tensors by their keys without wrappers' prefixes, and the entry they are in ("" for the top level)."""

    state: State
    entry: str = "state_dict"
    wrapped: bool = False

    @classmethod
    def of(cls, checkpoint: Mapping, source: str) -> "Tensors":
        """The tensors of a checkpoint dictionary. UserError when there are none."""
        bare = {key: value for key, value in checkpoint.items() if key not in ASSUMED}
        entry, content = _tensors_in(bare, "")
        if entry is None:
            raise UserError(f"{source} {content}")
        state = unwrap(content)
        return cls(state, entry, state.keys() != content.keys())


def _tensors_in(content: Mapping, entry: str) -> tuple[str | None, Any]:
    """The entry that holds tensors and nothing else, and what it holds; or None, and why there is no such entry."""
    inside = [name for name in ENTRIES if isinstance(content.get(name), Mapping) and content[name]]
    if not inside:
        wrong = [key for key, value in content.items() if not (isinstance(key, str) and dense(value))]
        if content and not wrong:
            return entry, content
        if not content or len(wrong) == len(content):
            entries = ", ".join(map(str, list(content)[:8])) or "nothing"
            return None, f"has no state_dict of tensors, nor {', '.join(ENTRIES[1:7])}: {entry or 'it'} holds {entries}"
        return None, f"has {wrong[0]!r:.80} among its weights, which is no tensor of stored numbers: leave it out"
    if entry.count(".") > 4:
        return None, f"has no tensors down to {entry}"
    found = [_tensors_in(content[name], f"{entry}.{name}".lstrip(".")) for name in inside]
    return next((result for result in found if result[0] is not None), found[0])


def unwrap(state: Mapping[str, Tensor]) -> State:
    """The same tensors, without the prefixes that data parallelism, compilation and averaging put before every key."""
    state = {key: value for key, value in state.items() if key != "n_averaged"}
    while state and (prefix := next((text for text in WRAPPERS if all(key.startswith(text) for key in state)), None)):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    # SupContrast wraps its encoder alone.
    inner = {re.sub(r"^(\w+)\.(module|_orig_mod)\.", r"\1.", key): value for key, value in state.items()}
    return inner if len(inner) == len(state) else state


# ---- comparing and loading -------------------------------------------------------------------------------------------


def compare_keys(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Why `state` does not load in place of `expected`: a phrase each for missing, unexpected and misshapen keys."""
    both = [key for key in expected if key in state]
    misshapen = [key for key in both if state[key].shape != expected[key].shape]
    return in_words(
        missing=[key for key in expected if key not in state],
        unexpected=[key for key in state if key not in expected],
        misshapen=[f"{key} {tuple(state[key].shape)} for {tuple(expected[key].shape)}" for key in misshapen],
    )


def in_words(**kinds: Sequence[str]) -> list[str]:
    """A phrase for each kind of keys (missing, unexpected, ...) of which there are any."""
    phrases = []
    for kind, keys in kinds.items():
        more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
        if keys:
            phrases.append(f"{len(keys)} {kind.replace('_', ' ')}: {', '.join(keys[:6])}{more}")
    return phrases


def check_numbers(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """UserError where tensors have another kind of numbers than expected, or numbers with which no network computes."""
    both = [key for key in expected if key in state]
    kind = [key for key in both if state[key].is_floating_point() != expected[key].is_floating_point()]
    weights = {key: state[key].to(expected[key].dtype) for key in both if expected[key].is_floating_point()}
    problems = in_words(
        of_another_type=[f"{key} ({state[key].dtype})" for key in kind],
        with_NaN_or_infinity=[key for key, value in weights.items() if not value.isfinite().all()],
        with_negative_variances=[
            key for key, value in weights.items() if key.endswith("running_var") and (value < 0).any()
        ],
    )
    if problems:
        raise UserError(f"{source} has weights that cannot be used, {'; '.join(problems)}: give another checkpoint")


def load_checked(module: torch.nn.Module, state: Any, source: str) -> None:
    """Load `state` strictly. UserError names what is missing, unexpected, misshapen or no number; nothing is loaded."""
    if not isinstance(state, Mapping):
        raise UserError(f"{source} has a {type(state).__name__} instead of weights: give another checkpoint")
    wrong = [str(key) for key, value in state.items() if not (isinstance(key, str) and dense(value))]
    problems = in_words(not_of_stored_numbers=wrong) or compare_keys(state, module.state_dict())
    if problems:
        raise UserError(f"{source} does not fit {getattr(module, 'arch', 'the model')}: {'; '.join(problems)}")
    check_numbers(state, module.state_dict(), source)
    module.load_state_dict(state)


def with_counters(state: State) -> State:
    """Adds BatchNorm's batch counters, which files from before 2018 lack and nothing here reads."""
    if any(key.endswith(".num_batches_tracked") for key in state):
        return state
    norms = [key.removesuffix("running_mean") for key in state if key.endswith(".running_mean")]
    return {**state, **{f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms}}
