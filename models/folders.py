"""Encoders in folders of timm and Hugging Face (config.json beside the weights), built by the library that wrote them.

The libraries are optional, and imported only when such a folder is read. Nothing is downloaded, and no code in it runs.
"""

import contextlib
import importlib
import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from files.reading import checked, normalisation, number, optional
from models.files import LARGEST_SIDE, MARKS
from models.layouts import Inputs, describe
from models.simclr import SimCLREncoder
from models.tensors import State, check_numbers, in_words, load_checked, unwrap, with_counters
from models.wrapped import Wrapped
from utils import UserError, seeded

# Prefixes of the task heads that a Hugging Face encoder may have.
TASK_PARTS = ("classifier.", "cls_classifier.", "distillation_classifier.", "decoder.")


def encoder_from_folder(checkpoint: Mapping, source: str) -> SimCLREncoder:
    """The encoder of a folder that `read_checkpoint` has read, in eval mode, with its report.

    UserError when the library is not installed or does not know the network, or the weights do not fit it exactly.
    """
    library = checkpoint["library"]
    build, read = LIBRARIES[library]
    package, state = _import(library, source), with_counters(unwrap(checkpoint["state_dict"]))
    if any(value.is_complex() for value in state.values()):
        raise UserError(f"{source} has weights of complex numbers: give another checkpoint")
    with seeded(0):  # so that reading a file does not advance the global generator
        model, ignored, (input_size, normalize) = build(package, checkpoint, state, source)
        check_numbers(model.state_dict(), model.state_dict(), source)
    arch = f"{library}/{checkpoint['config'][MARKS[library]]}"
    backbone = Wrapped(model, read, _width(model.eval(), read, input_size, source))
    encoder = SimCLREncoder(backbone, arch, None, normalize, input_size).eval()
    encoder.report = describe(f"a {library} folder", encoder, len(state) - sum(ignored.values()), ignored)
    return encoder


def _import(library: str, source: str) -> ModuleType:
    package = {"huggingface": "transformers"}.get(library, library)
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"reading {source} needs the package {package}: pip install {package}") from None


@contextlib.contextmanager
def _rehearsal(state: State, source: str) -> Iterator[None]:
    """Inside it networks are built without memory. UserError as soon as one is larger than the weights in the file."""
    left = {"tensors": 2 * len(state) + 64, "numbers": 2 * sum(value.numel() for value in state.values()) + 2**20}

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            left["tensors"] -= 1
            left["numbers"] -= parameter.numel()
        if min(left.values()) < 0:
            raise UserError(f"{source}: its config.json describes a larger network than the weights beside it")

    hook = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            yield
    finally:
        hook.remove()


def _checked_inputs(size: object, normalize: tuple | None, source: str) -> Inputs:
    side = optional(number(whole=True, at_least=1, at_most=LARGEST_SIDE))
    fields = {"the size of images": side, "mean and std": optional(normalisation)}
    checked({"the size of images": size, "mean and std": normalize}, fields, source)
    return size, normalize


def _width(model: nn.Module, read: Callable[[object], Tensor], input_size: int | None, source: str) -> int:
    """Width of a representation. UserError when the network returns none, or a different vector each time."""
    size = input_size or 64
    image = torch.linspace(0, 1, 3 * size * size).view(1, 3, size, size)
    try:
        with torch.no_grad():
            first, second = read(model(image)), read(model(image))
    except Exception as error:  # whatever the library raises on such input
        raise UserError(f"{source} takes no images of 3 x {size} x {size}: {_brief(error)}") from None
    if not isinstance(first, Tensor) or first.dim() != 2 or not torch.equal(first, second):
        raise UserError(f"{source} does not give an image a single vector, the same each time: it is not an encoder")
    return first.shape[1]


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _parts(keys: Iterable[str], parts: Sequence[str]) -> Counter:
    """How many keys begin with each of the parts."""
    firsts = (next((part for part in parts if key.startswith(part)), None) for key in keys)
    return Counter(part for part in firsts if part)


# ---- timm ----


def _build_timm(timm: ModuleType, checkpoint: Mapping, state: State, source: str) -> tuple[nn.Module, Counter, Inputs]:
    config = checkpoint["config"]
    arch = config["architecture"]
    if not timm.is_model(arch):  # this also rejects names that timm would look up on the internet
        raise UserError(f"{source}: timm {timm.__version__} has no architecture {arch!r}: install a version with it")
    # Only the network's arguments: those of create_model would read or fetch other weights.
    refused = {*inspect.signature(timm.create_model).parameters, "num_classes", "pretrained_model_args"}
    arguments = {name: value for name, value in config.get("model_args", {}).items() if name not in refused}
    try:
        with _rehearsal(state, source):
            timm.create_model(arch, pretrained=False, num_classes=0, **arguments)
        model = timm.create_model(arch, pretrained=False, num_classes=0, **arguments)
    except UserError:
        raise
    except Exception as error:  # of any type, for arguments that the network does not take
        raise UserError(f"{source}: timm cannot build {arch} by its config.json: {_brief(error)}") from None
    written = {**model.pretrained_cfg, **config.get("pretrained_cfg", {})}
    classifier = written.get("classifier") or ()
    classifier = [f"{name}." for name in ((classifier,) if isinstance(classifier, str) else classifier)]
    kept = {key: value for key, value in state.items() if not key.startswith(tuple(classifier))}
    load_checked(model, kept, source)
    size = _side(arguments.get("img_size", written["input_size"]))
    inputs = _checked_inputs(size, (written["mean"], written["std"]), source)
    return model, _parts(state, classifier), inputs


def _side(size: object) -> int | None:
    """The side of a square image, however the file spells it; None where it does not say."""
    if isinstance(size, Mapping):
        size = size.get("height", size.get("shortest_edge"))
    return size[-1] if isinstance(size, list | tuple) else size


# ---- Hugging Face ----


def _build_huggingface(
    transformers: ModuleType, checkpoint: Mapping, state: State, source: str
) -> tuple[nn.Module, Counter, Inputs]:
    config = checkpoint["config"]
    if "timm_backbone" in json.dumps(config):
        raise UserError(f"{source}: its network is a timm backbone, which would be downloaded: save it with timm")
    model, found = _load_huggingface(transformers, config, state, source)
    if found["missing_keys"] and all(key.startswith("pooler.") for key in found["missing_keys"]):
        # A network saved for a task has no pooler: then tokens are averaged.
        model, found = _load_huggingface(transformers, config, state, source, add_pooling_layer=False)
    strange = [key for key in found["unexpected_keys"] if not key.startswith(TASK_PARTS)]
    misshapen = [f"{key} {tuple(shape)} for {tuple(wanted)}" for key, shape, wanted in found["mismatched_keys"]]
    problems = in_words(missing=sorted(found["missing_keys"]), unexpected=sorted(strange), misshapen=sorted(misshapen))
    if problems:
        raise UserError(f"{source} does not fit {config['model_type']}: {'; '.join(problems)}")
    inputs = _checked_inputs(*_huggingface_inputs(config, checkpoint["preprocessor"]), source)
    return model, _parts(found["unexpected_keys"], TASK_PARTS), inputs


def _load_huggingface(
    transformers: ModuleType, config: Mapping, state: State, source: str, **options: bool
) -> tuple[nn.Module, dict]:
    """The network without a task head, and the library's report on the keys, after renaming those of older files."""
    # The configuration may name an implementation of attention that is code on the internet.
    plain = {key: value for key, value in config.items() if "attn_implementation" not in key}
    options |= {"attn_implementation": "eager", "local_files_only": True, "dtype": torch.float32}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        read = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(plain)
        network = transformers.MODEL_MAPPING[type(read)]
        with _rehearsal(state, source), _quiet(transformers):
            network(read)
        with _quiet(transformers):
            return network.from_pretrained(None, config=read, state_dict=dict(state), **options)
    except UserError:
        raise
    except Exception as error:  # of any type, for settings that the network does not take
        arch = config["model_type"]
        raise UserError(f"{source}: transformers cannot build {arch} by its config.json: {_brief(error)}") from None


@contextlib.contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Suppresses the library's report and progress bars."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _huggingface_inputs(config: Mapping, preprocessor: Mapping) -> Inputs:
    """Size and normalisation from preprocessor_config.json; without it, only the size in the network's config."""
    size = preprocessor.get("crop_size") if preprocessor.get("do_center_crop") else preprocessor.get("size")
    size = _side(size or config.get("image_size"))
    mean, std = preprocessor.get("image_mean"), preprocessor.get("image_std")
    if not (mean and std and preprocessor.get("do_normalize", True)):
        return size, None
    return size, (mean, std)


def _pooled(output: Mapping[str, Tensor]) -> Tensor:
    """The pooled output (B, D) if there is any, else the mean over tokens (B, T, D) or positions (B, D, H, W)."""
    if output.get("pooler_output") is not None:
        return output["pooler_output"].flatten(1)
    last = output["last_hidden_state"]
    return last.mean(dim=(2, 3)) if last.dim() == 4 else last.mean(dim=1)


# For each library: how a folder becomes a network, and how a representation is read from its output.
LIBRARIES = {"timm": (_build_timm, nn.Identity()), "huggingface": (_build_huggingface, _pooled)}
