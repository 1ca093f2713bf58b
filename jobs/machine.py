"""Where and how a script runs: device, precision, threads, and the folders of runs."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from jobs.meeting import set_up_job
from jobs.memory import keep_freed_memory
from jobs.place import Processes, refuse_several
from settings import Command, Settings, read_switch, setting
from utils import Precision, UserError, choose_device


def _read_resume(text: str) -> bool | Path:
    """True, False or a path; nothing, as the 2022 command lines had it, is False."""
    if text.lower() in ("true", "false"):
        return read_switch(text)
    return Path(text) if text else False


def _other_device(command: Command) -> str | None:
    return None if command.device == "auto" else f"with --device {command.device}"


@dataclass(frozen=True)
class Machine(Settings):
    """What a run is computed on, where it goes, and whether it goes on from an earlier run."""

    checkpoint_dir: Path = setting(Path("checkpoints"), "root of all runs", named=False)
    run_dir: Path | None = setting(
        None, "folder of this run", named=False, otherwise="one below --checkpoint-dir, named by the settings"
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:N", named=False)
    gpu_index: int = setting(
        0,
        "number of the CUDA device that --device auto takes",
        at_least=0,
        flags=("--gpu", "--gpu-index"),
        named=False,
        acts=_other_device,
    )
    precision: str = setting(
        "auto",
        "number format of the networks; auto is bf16 where the hardware multiplies it, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    fp16_precision: bool = setting(False, "the same as --precision fp16", named=False)
    seed: int = setting(0, "seed of every random draw")
    resume: Path | bool = setting(
        False,
        "go on with the run of the same name, or do nothing if it is finished; a path names a checkpoint to go on from",
        read=_read_resume,
        optional_value=True,
        named=False,
    )
    clear: bool = setting(True, "delete the log, metrics and events of an earlier run of the same name", named=False)
    title = "run"


@dataclass(frozen=True)
class Threads(Settings):
    """How many CPU threads compute."""

    workers: int | None = setting(
        None,
        "CPU threads; another number changes the last digits of weights, so --resume takes that of the run",
        at_least=1,
        flags=("-j", "--workers"),
        otherwise="all cores",
        named=False,
    )
    title = "run"


def set_up(command: Command) -> tuple[Machine, Precision]:
    """Join the job's other processes, and choose threads, device and precision as the command line says.

    Puts `Machine` into force, and `Threads` and `Processes` where the script has their flags, unless they are in force
    already. UserError when what is asked for is not to be had, or when a script for a single process was started as one
    of several.
    """
    machine = _in_force(command, Machine)
    place = set_up_job(_in_force(command, Processes)) if Processes in command.parser.owners else refuse_several()
    if place:
        check_flags(command, place.rank)
    machine = _settle_precision(command, machine)
    if "gpu_index" in command.given:
        reason = command.why_idle("gpu_index") if machine.gpu_index else None
        if place and not reason:
            reason = f"with {place.processes} processes, each takes its own"
        if reason:
            raise UserError(f"--gpu-index has no effect {reason}: leave it out")
    if Threads in command.parser.owners:
        threads = _in_force(command, Threads).workers
        if threads:
            torch.set_num_threads(threads)
    gpu_index = machine.gpu_index
    if place and machine.device == "auto" and torch.cuda.is_available():
        # A GPU for each process of this machine; a scheduler may show each process only its own.
        gpu_index = place.local_rank % torch.cuda.device_count()
    device = choose_device(machine.device, gpu_index)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        if device.index is not None:
            torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    return machine, Precision.choose(machine.precision, device)


def check_flags(command: Command, rank: int) -> None:
    """UserError that names a flag which this process of the job has otherwise than rank 0."""
    mine = {name: str(value) for name, value in command.given.items() if name not in ("rank", "gpu_index", "dist_url")}
    given = [None] * dist.get_world_size()
    dist.all_gather_object(given, mine)
    for name in sorted(given[0].keys() | mine.keys()):
        first, here = (flags.get(name, "left out") for flags in (given[0], mine))
        if first != here:
            flag = command.parser.settings[name].flag
            raise UserError(
                f"{flag} is {first} in process 0 of the job, {here} in process {rank}: give all the same flags"
            )


def _in_force(command: Command, owner: type[Settings]) -> Settings:
    """The instance in force of a class, which is put into force if there is none."""
    return command[owner] if command.all(owner) else command.use(owner)


def _settle_precision(command: Command, machine: Machine) -> Machine:
    """--fp16-precision is --precision fp16, in the run's name and configuration too."""
    if not machine.fp16_precision:
        return machine
    if machine.precision not in ("auto", "fp16"):
        raise UserError(f"--fp16-precision and --precision {machine.precision} contradict each other: give one")
    command.set(precision="fp16")
    settled = dataclasses.replace(machine, precision="fp16")
    command.in_force[command.in_force.index(machine)] = settled
    return settled
