"""What would make training faster, measured: each option against the same work without it.

    python -m benchmarks.options

What pays is an option of the library; the rest is in `docs/performance.md`, with these figures.
Alternating in one run, medians of ratios, as in `overhead`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.overhead import Row, Work, alternate
from benchmarks.worlds import WIDTH, make_bank, make_teacher
from redif_env import Denoiser
from redif_env.errors import require


@dataclasses.dataclass
class Args:
    """Measure options of speed on forwards, on forwards and backwards, and on what is beside."""

    network: str = "digits"
    """`digits`, `pixels` or `latents`."""
    width: int = WIDTH
    """Channels of the latter two."""
    num_rows: int = 128
    """Rows of a forward."""
    repeats: int = 7
    """Alternations."""
    float16: bool = False
    """Whether to measure float16 too, which takes minutes on processors that lack it."""
    compiled: bool = True
    """Whether to measure torch.compile, which needs a C++ compiler on a CPU."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to measure."""
    out: Path | None = None
    """JSON file to write."""


@dataclasses.dataclass
class Asked:
    """A network of one's own and the rows that it is asked about."""

    denoiser: Denoiser
    x_t: Tensor
    t: Tensor
    condition: Tensor | None

    def forward(self) -> None:
        with torch.no_grad():
            self.denoiser(self.x_t, self.t, self.condition)

    def backward(self) -> None:
        self.denoiser.zero_grad()
        self.denoiser(self.x_t, self.t, self.condition).square().mean().backward()


def main(args: Args) -> list[Row]:
    """Measure, print the table, and return it."""
    teacher = make_teacher(args.network, args.width, args.device)
    bank = make_bank(teacher, args.num_rows)
    t = torch.full((args.num_rows,), 500.0, device=args.device)

    def asked(change: Callable[[Denoiser], None] = lambda denoiser: None) -> Asked:
        denoiser = copy.deepcopy(teacher.denoiser).requires_grad_(True)
        change(denoiser)
        return Asked(denoiser, bank.x_T, t, bank.condition)

    plain = asked()
    variants = {"bfloat16 autocast": asked(_autocast(torch.bfloat16))}
    variants["channels last"] = asked(_channels_last)
    if args.float16:
        variants["float16 autocast"] = asked(_autocast(torch.float16))
    if args.compiled:
        variants["torch.compile"] = asked(_compile)
    for variant in [plain, *variants.values()]:
        variant.backward()
        variant.forward()
    pairs: dict[tuple[str, str], tuple[Work, Work]] = {}
    for name, variant in variants.items():
        pairs[name, "forward"] = variant.forward, plain.forward
        pairs[name, "forward and backward"] = variant.backward, plain.backward
    fused, default = (_stepper(plain.denoiser, **o) for o in ({"fused": True}, {}))
    pairs["fused Adam", "Adam's step"] = fused, default
    half, whole = (_storing(bank.x_T, dtype) for dtype in (torch.bfloat16, torch.float32))
    pairs["rollout in bfloat16", "a store and a read"] = half, whole
    rows = alternate(pairs, args.repeats, args.device)
    for row in rows:
        print(f"{row.name:24}{row.against:24}{1e3 * row.seconds:10.2f} ms{row.ratio:8.3f}")
    print(args, torch.get_num_threads(), "threads, torch", torch.__version__)
    if args.out is not None:
        content = {
            "ratios": [row._asdict() for row in rows],
            "args": {k: v for k, v in vars(args).items() if k != "out"},
        }
        args.out.write_text(json.dumps(content, indent=1, default=str) + "\n")
    return rows


def _autocast(dtype: torch.dtype) -> Callable[[Denoiser], None]:
    def change(denoiser: Denoiser) -> None:
        denoiser.autocast = dtype

    return change


def _channels_last(denoiser: Denoiser) -> None:
    nn.Module.to(denoiser.network, memory_format=torch.channels_last)


def _compile(denoiser: Denoiser) -> None:
    denoiser.network.compile()


def _stepper(denoiser: Denoiser, **options: Any) -> Work:
    """A step of the optimiser with the gradients that are there."""
    return torch.optim.Adam(denoiser.network.parameters(), lr=0.0, **options).step


def _storing(latents: Tensor, dtype: torch.dtype) -> Work:
    """Putting latents into a buffer of this dtype, and a minibatch of them back into float32."""
    buffer = latents.new_empty((16, *latents.shape), dtype=dtype)
    rows = torch.randperm(len(buffer.flatten(0, 1)), device=latents.device)[: len(latents)]

    def work() -> None:
        for step in range(len(buffer)):
            buffer[step] = latents
        for _ in range(len(buffer)):
            buffer.flatten(0, 1)[rows].float()

    return work


if __name__ == "__main__":
    main(require("tyro", "examples").cli(Args))
