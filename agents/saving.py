"""What an agent is saved with beside weights and optimiser, so that training goes on the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from redif_env.errors import InvalidArgumentError
from redif_env.rewards import OnlineReward

from .checkpoints import pack


class TrainingState:
    """The online terms of the environment's reward, and the order of minibatches.

    Stable-Baselines3 saves and loads it as it does modules. The state of a reward waits until there
    is an environment: an agent may be loaded before it gets one.
    """

    def __init__(self) -> None:
        self.terms: list[OnlineReward] = []
        self.order: torch.Generator | None = None
        self._waiting: Mapping[str, Any] = {}

    def attach(self, terms: list[OnlineReward], order: torch.Generator | None) -> None:
        """Name what is saved from here on; gives the terms the state that waited for them.

        Raises:
            InvalidArgumentError: if that is the state of other terms, or theirs can not be saved.
        """
        for term in terms:
            _check_state(term)
        self.order = order
        if terms and self._waiting:
            _load(terms, self._waiting)
            self._waiting = {}
        self.terms = terms

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and text, in dicts and lists."""
        order = None if self.order is None else self.order.get_state()
        states = {_key(i, term): term.state_dict() for i, term in enumerate(self.terms)}
        return {"rewards": states or dict(self._waiting), "order": order}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Go on from what `state_dict` returned; `strict` changes nothing."""
        self._waiting = state["rewards"]
        self.attach(self.terms, self.order)
        order = state["order"]
        # Generators of another kind of device have a state of another size.
        both = self.order is not None and order is not None
        if both and len(order) == len(self.order.get_state()):  # type: ignore[union-attr]
            self.order.set_state(order.cpu())  # type: ignore[union-attr]


def _check_state(term: OnlineReward) -> None:
    """Refuse what checkpoints and `load` would not take, before anything is trained."""
    try:
        state = term.state_dict()
    except Exception as error:
        raise InvalidArgumentError(
            "reward",
            term.name,
            f"its state_dict() fails before the first update ({type(error).__name__}: {error}): "
            "make what it holds in __init__.",
        ) from error
    try:
        pack(state)
    except TypeError as error:
        raise InvalidArgumentError(
            "reward",
            term.name,
            f"its state_dict() must hold tensors, plain numbers and text alone ({error}): convert "
            "numbers of numpy with float(), arrays with torch.as_tensor().",
        ) from error


def _key(index: int, term: OnlineReward) -> str:
    return f"{index}.{term.name}"


def _load(terms: list[OnlineReward], states: Mapping[str, Any]) -> None:
    keys = [_key(index, term) for index, term in enumerate(terms)]
    if keys != list(states):
        raise InvalidArgumentError(
            "env",
            f"with {keys} in its reward",
            f"the agent was saved with {list(states)}: pass an environment with these, in order.",
        )
    for key, term in zip(keys, terms, strict=True):
        try:
            term.load_state_dict(states[key])
        except (KeyError, RuntimeError, ValueError) as error:
            raise InvalidArgumentError(
                "env", f"reward {term.name!r}", f"make it with the same arguments ({error})."
            ) from error
