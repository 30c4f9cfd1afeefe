"""The teacher, and the bank of its answers that students are rewarded against."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import parallel
from .code_key import changes, own_code
from .codec import Codec
from .denoiser import Denoiser
from .errors import CacheError, InvalidArgumentError, check_choice, check_device, check_integer
from .files import write_tensors
from .noise import NoiseSchedule, noise_schedule, prediction_type

# Independent streams of noise: each split adds its own constant to the seed's hash.
SPLITS = ("train", "validation", "test")
CACHE_VARIABLE = "REDIF_CACHE"


class Teacher:
    """A diffusion model together with the sampler that defines its answer.

    Args:
        denoiser: The model.
        make_solver: Returns a fresh diffusers scheduler; it must be deterministic.
        num_steps: Steps of the solver, 50 by default.
        source: Folder or name that the teacher was loaded from, for records; may be None.
        codec: What turns its latents into pixels; None where pixels are denoised.

    Raises:
        InvalidArgumentError: for a solver that draws random numbers: its answers are no function of
            the noise, so that nothing could learn them; and for one that is none, that can not make
            so many steps, or is of another noise schedule, time axis or prediction type than the
            denoiser.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        make_solver: Callable[[], Any],
        num_steps: int = 50,
        source: str | None = None,
        codec: Codec | None = None,
    ) -> None:
        if not isinstance(denoiser, Denoiser):
            raise InvalidArgumentError("denoiser", type(denoiser).__name__, "pass a Denoiser.")
        if not callable(make_solver):
            raise InvalidArgumentError(
                "make_solver",
                type(make_solver).__name__,
                "pass a function that returns a fresh one at each call, such as a lambda.",
            )
        self.denoiser = denoiser.eval().requires_grad_(False)
        self.make_solver = make_solver
        self.num_steps = check_integer("num_steps", num_steps, 1)
        self.source = source
        self.codec = codec
        _check_solver(make_solver(), denoiser)
        _check_steps(make_solver, self.num_steps, denoiser)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.denoiser.device

    def to(self, device: str | torch.device) -> Teacher:
        """Move network, conditions and codec to `device`; returns self.

        Raises:
            InvalidArgumentError: for a device that torch does not have here.
        """
        check_device(device)
        self.denoiser.to(device)
        if self.codec is not None:
            self.codec.to(device)
        return self

    def offload(self) -> Teacher:
        """Move the network's weights to the CPU, once its answers are in a bank; returns self.

        Environments and students go on where they are. The teacher still answers, and pictures are
        still drawn, on the CPU; `to` takes it back.
        """
        self.denoiser.network.to("cpu")
        return self

    @torch.no_grad()
    def sample(self, x_T: Tensor, condition: Tensor | None = None) -> Tensor:
        """The teacher's answer `x_0` to the noise `x_T`, both float32 `(N, ...)`.

        Args:
            x_T: Initial noise, of std `schedule.initial_std`.
            condition: Classes, int64 `(N,)`, or None.

        Raises:
            InvalidArgumentError: for noise of another shape or that is not finite, and for classes
                that are missing, of another shape or dtype, or out of range.
        """
        _check_noise(self.denoiser, x_T)
        _check_condition(self.denoiser, condition, len(x_T))

        def predict(model_input: Tensor, t: Tensor) -> Tensor:
            return self.denoiser.predict(model_input, t.float().expand(len(x_T)), condition)

        return _solve(
            self.make_solver(), self.num_steps, predict, x_T, self.denoiser.schedule.initial_std
        )

    def fingerprint(self) -> str:
        """Hex digest of what the answers depend on: weights, code, guidance, solver, steps."""
        solver = self.make_solver()
        digest = hashlib.sha256()
        # Private entries of a config depend on how it was loaded, and their order on the process.
        config = {name: value for name, value in solver.config.items() if name[0] != "_"}
        settings = [
            type(solver).__name__,
            config,
            self.num_steps,
            self.denoiser.guidance_scale,
            self.denoiser.guidance_rescale,
            self.denoiser.prediction_type,
            self.denoiser.num_classes,
            self.denoiser.null_class,
            self.denoiser.latent_shape,
            _scales(self.denoiser.schedule),
            *architecture(self.denoiser.network),
            *own_code(self.denoiser.network, self.denoiser.call),
            *changes(self.denoiser.network),
        ]
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        _update(digest, self.denoiser.network.state_dict())
        _update(digest, _unsaved_buffers(self.denoiser.network))
        if self.denoiser.conditions is not None:
            _update(digest, self.denoiser.conditions.tensors())
        return digest.hexdigest()


def _check_noise(denoiser: Denoiser, x_T: Tensor) -> None:
    shape = tuple(getattr(x_T, "shape", ()))
    if not isinstance(x_T, Tensor) or not len(shape) or shape[1:] != denoiser.latent_shape:
        raise InvalidArgumentError(
            "x_T", shape or x_T, f"pass a tensor (N, *latent_shape), N of {denoiser.latent_shape}."
        )
    if not x_T.is_floating_point() or not bool(x_T.isfinite().all()):
        raise InvalidArgumentError("x_T", x_T.dtype, "pass finite floats: denoiser.initial_noise.")


def _check_condition(denoiser: Denoiser, condition: Tensor | None, num: int) -> None:
    known = denoiser.num_classes
    if (condition is None) != (known is None):
        remedy = "leave it out: it has no classes." if known is None else f"pass {num} classes."
        raise InvalidArgumentError("condition", condition, remedy)
    if condition is None or known is None:
        return
    most = max(known - 1, denoiser.null_class or 0)
    fits = isinstance(condition, Tensor) and condition.shape == (num,)
    if not fits or condition.dtype not in (torch.int64, torch.int32):
        given = f"{getattr(condition, 'dtype', '')} {tuple(getattr(condition, 'shape', ()))}"
        raise InvalidArgumentError("condition", given, f"pass classes, int64 ({num},).")
    if num and not bool(((condition >= 0) & (condition <= most)).all()):
        raise InvalidArgumentError(
            "condition", condition.tolist(), f"pass classes in [0, {most}], the last included."
        )


def _solve(
    solver: Any,
    num_steps: int,
    predict: Callable[[Tensor, Tensor], Tensor],
    x_T: Tensor,
    initial_std: float = 1.0,
) -> Tensor:
    """Where a diffusers scheduler gets from `x_T` with the predictions of `predict`.

    Some schedulers (Euler, Heun, LMS) step through `x_t / alpha_t`, whose std at the start is
    `init_noise_sigma`, and scale it back before the network sees it.
    """
    solver.set_timesteps(num_steps, device=x_T.device)
    # Flow-matching schedulers have no such method: their networks see the latents as they are.
    scale = getattr(solver, "scale_model_input", lambda x_t, t: x_t)
    x_t = x_T * (getattr(solver, "init_noise_sigma", initial_std) / initial_std)
    for t in solver.timesteps:
        prediction = predict(scale(x_t, t), t)
        x_t = solver.step(prediction, t, x_t).prev_sample
    return x_t


def _check_solver(solver: Any, denoiser: Denoiser) -> None:
    """Refuse what can not step, and what steps through another process than the denoiser's."""
    name = type(solver).__name__
    missing = [need for need in ("set_timesteps", "step", "config") if not hasattr(solver, need)]
    if missing:
        raise InvalidArgumentError(
            "make_solver", name, f"return a diffusers scheduler: this has no {missing[0]}."
        )
    schedule, config = denoiser.schedule, solver.config
    length = config.get("num_train_timesteps", schedule.num_train_timesteps)
    if length != schedule.num_train_timesteps or not _same_process(solver, schedule):
        raise InvalidArgumentError(
            "make_solver",
            name,
            "it has another noise schedule than the denoiser: use the same config.",
        )
    predicts = config.get("prediction_type", denoiser.prediction_type)
    if name.startswith("FlowMatch"):  # their configs do not say
        predicts = prediction_type(solver)
    if predicts != denoiser.prediction_type:
        raise InvalidArgumentError(
            "make_solver",
            f"{name} of a {predicts} network",
            f"make it with prediction_type={denoiser.prediction_type!r}, as the denoiser.",
        )


def _same_process(solver: Any, schedule: NoiseSchedule) -> bool:
    """Whether a solver's scales are the schedule's, as far as the solver is known to tell."""
    try:
        other = noise_schedule(solver)
    except (InvalidArgumentError, AttributeError):  # of one's own
        return True
    own = copy.deepcopy(schedule).to("cpu")
    t = torch.arange(1.0, own.num_train_timesteps)  # time 0 is the data in ours
    # Zero terminal SNR is 2^-24 in some schedulers.
    return torch.allclose(own.alpha(t) ** 2, other.alpha(t) ** 2, rtol=0, atol=1e-4) and (
        torch.allclose(own.sigma(t) ** 2, other.sigma(t) ** 2, rtol=1e-3, atol=1e-4)
    )


def _check_steps(make_solver: Callable[[], Any], num_steps: int, denoiser: Denoiser) -> None:
    """Solve twice with a prediction of 0, which takes milliseconds, and compare."""
    name = type(make_solver()).__name__
    x_T = torch.ones(1, 1, 2, 2, device=denoiser.device)
    times: list[float] = []

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        times.append(float(t))
        return torch.zeros_like(x_t)

    try:
        with torch.random.fork_rng(devices=[]):
            first, second = (_solve(make_solver(), num_steps, predict, x_T) for _ in range(2))
    except InvalidArgumentError:
        raise
    except Exception as error:  # diffusers raises many kinds
        raise InvalidArgumentError(
            "make_solver",
            name,
            f"it fails to make {num_steps} steps ({error}): pass fewer as num_steps, or another "
            "solver, such as DDIMScheduler.",
        ) from error
    if not torch.equal(first.nan_to_num(), second.nan_to_num()):
        raise InvalidArgumentError(
            "make_solver",
            name,
            "it draws random numbers: pass a deterministic one, such as DDIMScheduler.",
        )
    highest = denoiser.schedule.num_train_timesteps
    if times[-1] > times[0] or min(times) < 0 or max(times) > highest:
        raise InvalidArgumentError(
            "make_solver",
            f"{name} with times from {times[0]:g} to {times[-1]:g}",
            f"pass one whose times fall from at most {highest}, the noise, towards 0, the data, "
            "without invert_sigmas or timestep_type='continuous'.",
        )


def _scales(schedule: NoiseSchedule) -> list[Any]:
    """What tells schedules apart: the std at the start, and both scales at 100 times."""
    schedule = copy.deepcopy(schedule).to("cpu")  # other devices round otherwise
    times = torch.linspace(1.0, schedule.max_timestep, 100)
    return [schedule.initial_std, schedule.alpha(times).tolist(), schedule.sigma(times).tolist()]


def architecture(network: Any) -> list[Any]:
    """Name and settings of a network: the same weights can be read in more than one way."""
    config = getattr(network, "config", None)
    if not isinstance(config, Mapping):
        return [type(network).__name__, repr(network)]
    public = {name: value for name, value in config.items() if name[0] != "_"}
    return [type(network).__name__, public]


def _unsaved_buffers(network: nn.Module) -> dict[str, Tensor]:
    """Buffers that answers depend on too, though a state dict leaves them out."""
    saved = network.state_dict()
    return {name: buffer for name, buffer in network.named_buffers() if name not in saved}


@dataclasses.dataclass(frozen=True)
class TeacherBank:
    """A fixed pool of tasks and the teacher's answers.

    Attributes:
        x_T: Initial noise, float32 `(P, *latent_shape)`.
        teacher_x_0: The teacher's answers, float32 like `x_T`.
        condition: Classes or rows of the table, int64 `(P,)`; None for an unconditional teacher.
    """

    x_T: Tensor
    teacher_x_0: Tensor
    condition: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x_T)

    def digest(self) -> str:
        """SHA-256 of all tasks and answers, in hexadecimal digits."""
        return digest_of(self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"x_T": self.x_T, "teacher_x_0": self.teacher_x_0}
        return tensors if self.condition is None else {**tensors, "condition": self.condition}

    def to(self, device: str | torch.device) -> TeacherBank:
        """A copy of the bank on `device`."""
        condition = None if self.condition is None else self.condition.to(device)
        return TeacherBank(self.x_T.to(device), self.teacher_x_0.to(device), condition)

    def subset(self, num: int) -> TeacherBank:
        """The first `num` tasks."""
        condition = None if self.condition is None else self.condition[:num]
        return TeacherBank(self.x_T[:num], self.teacher_x_0[:num], condition)

    def take(self, rows: Tensor) -> TeacherBank:
        """The tasks in these rows, int64 `(N,)`."""
        condition = None if self.condition is None else self.condition[rows]
        return TeacherBank(self.x_T[rows], self.teacher_x_0[rows], condition)

    @classmethod
    def build(
        cls,
        teacher: Teacher,
        size: int,
        *,
        split: str = "train",
        seed: int = 0,
        batch_size: int = 256,
        cache_dir: str | Path | None = None,
        progress: bool = False,
    ) -> TeacherBank:
        """Load the bank from the cache, or ask the teacher and fill the cache.

        Noise and classes are drawn on the CPU, so that a seed means the same tasks on any device.
        Of several processes all must call it: each asks the teacher for a share, and all get all.

        Args:
            teacher: Whose answers to keep.
            size: Number of tasks P.
            split: `"train"`, `"validation"` or `"test"`: disjoint streams of noise.
            seed: Seed of the stream.
            batch_size: Rows the teacher answers at once.
            cache_dir: Folder of the cache; default `$REDIF_CACHE`, else `~/.cache/redif`.
            progress: Show a progress bar.

        Returns:
            The bank, on the teacher's device.

        Raises:
            InvalidArgumentError: for a size, split, seed or batch size that makes no sense, and for
                answers that are not finite.
            CacheError: if the cache cannot be written, for example on a full disk. Nothing partial
                is left behind.
        """
        size = check_integer("size", size, 1)
        batch_size = check_integer("batch_size", batch_size, 1)
        seed = check_integer("seed", seed, 0)
        check_choice("split", split, SPLITS)
        key = f"{teacher.fingerprint()[:32]}-{split}-{seed}-{size}"
        path = cache_folder(cache_dir) / f"bank-{key}.safetensors"
        bank = _read(path, key)
        parallel.check_same("teacher", key)
        if parallel.all_true(bank is not None):
            assert bank is not None
            return bank.to(teacher.device)
        if parallel.world_size() > 1:
            # Asked before the file is locked: who waits for a lock can not do its share.
            bank = _ask(cls, teacher, size, split, seed, batch_size, progress)
        with cache_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Two processes that want the same bank: the second waits, then reads.
            with FileLock(f"{path}.lock"):
                cached = _read(path, key)
                if cached is None:
                    bank = bank or _ask(cls, teacher, size, split, seed, batch_size, progress)
                    _write(path, bank, key)
        bank = bank or cached
        assert bank is not None
        return bank.to(teacher.device)


def split_seed(seed: int, split: str) -> int:
    """Seed of a split's noise: a hash, so that neighbouring seeds and splits share nothing."""
    return int.from_bytes(hashlib.sha256(f"{split} {seed}".encode()).digest()[:7], "big")


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Where banks are kept: `cache_dir`, else `$REDIF_CACHE`, else `~/.cache/redif`."""
    return Path(cache_dir or os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "redif")


def _ask(
    cls: type[TeacherBank],
    teacher: Teacher,
    size: int,
    split: str,
    seed: int,
    batch_size: int,
    progress: bool,
) -> TeacherBank:
    generator = torch.Generator().manual_seed(split_seed(seed, split))
    x_T = teacher.denoiser.initial_noise(size, generator)
    condition = teacher.denoiser.initial_condition(size, generator)

    def answer(share: Any) -> tuple[Tensor]:
        noise, known = x_T[share], None if condition is None else condition[share]
        answers = []
        batches = range(0, len(noise), batch_size)
        for start in tqdm(batches, f"teacher's answers ({split})", disable=not progress):
            rows = slice(start, start + batch_size)
            classes = None if known is None else known[rows].to(teacher.device)
            answers.append(teacher.sample(noise[rows].to(teacher.device), classes).cpu())
        return (torch.cat(answers),)

    (teacher_x_0,) = parallel.in_shares(answer, size)
    if not bool(teacher_x_0.isfinite().all()):
        raise InvalidArgumentError(
            "teacher",
            "answers of NaN or infinity",
            "look at its network, prediction type and schedule; float16 overflows: try another "
            "dtype.",
        )
    return cls(x_T, teacher_x_0, condition)


def _read(path: Path, key: str) -> TeacherBank | None:
    """The cached bank, or None if there is none or it is truncated, corrupt or another's."""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            return None
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except (OSError, SafetensorError):
        return None
    if metadata.get("key") != key or metadata.get("digest") != digest_of(tensors):
        return None
    if not {"x_T", "teacher_x_0"} <= tensors.keys():
        return None
    return TeacherBank(tensors["x_T"], tensors["teacher_x_0"], tensors.get("condition"))


def _write(path: Path, bank: TeacherBank, key: str) -> None:
    tensors = bank._tensors()
    write_tensors(path, tensors, {"key": key, "digest": digest_of(tensors)})


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, in hexadecimal digits."""
    digest = hashlib.sha256()
    _update(digest, tensors)
    return digest.hexdigest()


def _update(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    """Feed names, dtypes, shapes and bytes to a digest; bytes, because numpy has no bfloat16."""
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(data.numpy().tobytes())


@contextlib.contextmanager
def cache_errors(path: Path) -> Iterator[None]:
    """Turn what a full disk or a forbidden folder raises into a `CacheError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CacheError(
            f"cache_dir={str(path.parent)!r}: it could not be written there ({error}). "
            f"Free some space, or point {CACHE_VARIABLE} or cache_dir at a writable folder."
        ) from error
