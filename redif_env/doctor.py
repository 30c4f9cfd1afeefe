"""What is installed, what is missing, and whether training would fit: `python -m redif_env.doctor`.

Nothing is written or downloaded. The exit code is 1 if something that ReDiF needs is missing or
too old, the cache can not be written to, the teacher can not be loaded, or memory is too small.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from packaging.requirements import Requirement

from .errors import InvalidArgumentError, ReDiFError, check_integer, install_command
from .loading import load_teacher
from .memory import GB, Estimate, activations_of, estimate
from .teacher import CACHE_VARIABLE, Teacher, cache_folder

PACKAGE = "redif"
FREE = 0.9  # of a device: kernels and allocators need the rest


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; returns the exit code."""
    args = parse(arguments)
    problems: list[str] = []
    lines = [
        *report_versions(problems),
        *report_devices(),
        *report_cache(problems),
        *report_extras(),
        *report_memory(args, problems),
        "",
        *(f"problem: {problem}" for problem in problems),
        f"{len(problems)} problems" if problems else "all is well",
    ]
    print("\n".join(lines))
    return 1 if problems else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser("python -m redif_env.doctor", description=__doc__)
    parser.add_argument("--teacher", default="digits", help="bundled name or diffusers folder")
    parser.add_argument("--num-envs", type=int, default=512, help="trajectories of a rollout")
    parser.add_argument("--num-steps", type=int, default=4, help="steps of the student")
    parser.add_argument("--group-size", type=int, default=2, help="trajectories of one task")
    parser.add_argument("--batch-size", type=int, default=256, help="transitions of a minibatch")
    parser.add_argument("--micro-batch-size", type=int, help="sent at once; default: a minibatch")
    parser.add_argument("--bank-size", type=int, default=6144, help="training tasks")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")
    return parser.parse_args(arguments)


def report_versions(problems: list[str]) -> Iterator[str]:
    """Python, the system, and every package that ReDiF needs."""
    yield "versions"
    yield _row("python", f"{platform.python_version()}, {platform.platform()}")
    yield _row(PACKAGE, _version(PACKAGE) or "not installed")
    if not requirements():
        problems.append("redif is not installed: pip install -e . in its folder.")
    for need in requirements():
        found = _version(need.name)
        yield _row(need.name, f"{found or 'missing'}{'' if _meets(need) else f', needs {need}'}")
        if not _meets(need):
            problems.append(
                f"{need} is needed, {found or 'nothing'} is there: pip install '{need}'"
            )


def report_devices() -> Iterator[str]:
    """The host, and what torch can compute on."""
    yield "\ndevices"
    size = f"{host_memory() / GB:.1f} GB"
    yield _row("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {size}")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield _row(f"cuda:{index}", f"{found.name}, {found.total_memory / GB:.1f} GB")
    if torch.backends.mps.is_available():
        yield _row("mps", "available, shares the host's memory")


def report_cache(problems: list[str]) -> Iterator[str]:
    """Where banks are kept, and how many there are."""
    folder = cache_folder()
    banks = sorted(folder.glob("bank-*.safetensors")) if folder.is_dir() else []
    size = sum(bank.stat().st_size for bank in banks)
    yield "\nteacher banks"
    yield _row("folder", f"{folder} (${CACHE_VARIABLE})")
    yield _row("banks", f"{len(banks)}, {size:,} bytes")
    if not _writable(folder):
        problems.append(f"{folder} can not be written to: point {CACHE_VARIABLE} elsewhere.")


def report_extras() -> Iterator[str]:
    """What each extra lacks, and the line that installs it."""
    yield "\nextras"
    for extra in extras():
        missing = [str(need) for need in requirements(extra) if not _meets(need)]
        remedy = f"missing {', '.join(missing)}: {install_command(extra)}"
        yield _row(extra, remedy if missing else "complete")


def report_memory(args: argparse.Namespace, problems: list[str]) -> Iterator[str]:
    """What training a student of the teacher would take, and whether there is room."""
    yield ""
    try:
        teacher = load_teacher(args.teacher, device=args.device)
        needed = estimate_for(teacher, args)
    except (ReDiFError, RuntimeError, AssertionError) as error:  # the latter: torch without CUDA
        problems.append(str(error))
        yield _row("memory", "unknown")
        return
    room = device_memory(teacher.device)
    yield f"training a student of {args.teacher!r} on {teacher.device}"
    yield str(needed)
    yield _row("room", f"{room / GB:.1f} GB")
    if needed.total > FREE * room:
        problems.append(
            f"{needed.total / GB:.1f} GB are needed and {room / GB:.1f} GB are there: pass a "
            "smaller micro_batch_size, num_envs or bank_size, or train adapters (lora_rank)."
        )


def estimate_for(teacher: Teacher, args: argparse.Namespace) -> Estimate:
    """The estimate, with the activations of a micro-batch as `memory.activations_of` measures them.

    Raises:
        InvalidArgumentError: for settings that make no sense.
    """
    for name in ("num_envs", "num_steps", "group_size", "batch_size", "bank_size"):
        check_integer(name, getattr(args, name), 1)
    if args.num_envs % args.group_size:
        raise InvalidArgumentError("group_size", args.group_size, "pass a divisor of num_envs.")
    most = args.batch_size if args.micro_batch_size is None else args.micro_batch_size
    rows = min(check_integer("micro_batch_size", most, 1), args.num_envs * args.num_steps)
    return estimate(
        teacher,
        num_envs=args.num_envs,
        num_steps=args.num_steps,
        bank_size=args.bank_size,
        activations=activations_of(teacher, rows, FREE * device_memory(teacher.device)),
    )


def requirements(extra: str = "") -> list[Requirement]:
    """What ReDiF needs at all, or what an extra adds; without markers of other systems."""
    try:
        found = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or []]
    except importlib.metadata.PackageNotFoundError:
        return []
    needs: dict[str, Requirement] = {}
    for need in found:
        here = need.marker is None if not extra else need.marker is not None
        if not here or (need.marker and not need.marker.evaluate({"extra": extra})):
            continue
        inner = [r for e in sorted(need.extras) for r in requirements(e)]
        for each in inner if need.name == PACKAGE else [need]:
            each.marker = None
            needs[each.name] = each
    return list(needs.values())


def extras() -> list[str]:
    """Names of ReDiF's extras."""
    try:
        return importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def device_memory(device: torch.device) -> int:
    """Bytes of a device, in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory()


def host_memory() -> int:
    """Bytes of the host's memory, in all."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _meets(need: Requirement) -> bool:
    found = _version(need.name)
    return found is not None and need.specifier.contains(found, prereleases=True)


def _writable(folder: Path) -> bool:
    """Whether files can be made there, or the folder itself: in the nearest that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _row(name: str, value: str) -> str:
    return f"  {name:20}{value}"


if __name__ == "__main__":
    sys.exit(main())
