"""Reward functions as TRL's trainers name and call them, for whoever scores completions without a trainer.

What trains must give the same rewards, under the same names, everywhere else: functions, `functools.partial`,
instances with `__call__`, each of them sync or async, with the arguments that TRL adds to the data's columns.
"""

import asyncio
import functools
import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from transformers import TrainerState
from trl.trainer.utils import (
    get_callable_name,
    get_config_model_id,
    is_async_callable,
    start_event_loop_in_daemon,
)


RewardFunction = Callable[..., Any]

NOT_PASSED_ON = ("prompt", "completion", "completion_ids")
"""Columns of the data that TRL does not hand to reward functions, which have these from the policy."""

_TAKEN = ("prompts", "completions")  # what else reward functions have from the policy
_ADDED = ("completion_ids", "trainer_state", "log_extra", "log_metric")  # by TRL, besides these and the columns
_SOMETIMES_ADDED = {"environments"}


def reward_name(reward: RewardFunction | torch.nn.Module | str) -> str:
    """
    The name under which TRL logs a reward, and by which targets read it.

    Args:
        reward: a callable; a reward model, or its id or folder, whose name is the last part of that.
    """
    if isinstance(reward, str):
        return reward.split("/")[-1]
    if isinstance(reward, torch.nn.Module):
        return get_config_model_id(cast(Any, reward).config).split("/")[-1]
    return get_callable_name(reward)


def reward_names(rewards: Sequence[RewardFunction | torch.nn.Module | str]) -> list[str]:
    """
    The names of all rewards, each as [`reward_name`] has it.

    Raises:
        ValueError: two have the same; one sentence.
    """
    names = [reward_name(reward) for reward in rewards]
    refuse_same_names(names)
    return names


def refuse_same_names(names: Sequence[str]) -> None:
    """
    Refuses two rewards of one name: a target would read the first of them, and logs would show the second.

    Raises:
        ValueError: one sentence.
    """
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise ValueError(
            f"Two rewards are called {twice[0]!r}, so targets and logs could not tell them apart: give one of them "
            "another name, by `called` where the reward takes it ({name: ..., called: ...}), else by a function's "
            "`__name__` or a model's folder."
        )


def check_columns(columns: Sequence[str] | None) -> None:
    """
    Refuses columns of the data that reward functions would be given twice.

    Args:
        columns (`list[str]`, *optional*): of the data; a stream may not know them.

    Raises:
        ValueError: one sentence.
    """
    if taken := [name for name in columns or () if name in _TAKEN]:
        raise ValueError(
            f"The data has a column {taken[0]!r}, which is what reward functions call the policy's own: rename it."
        )


def check_reward_arguments(rewards: Sequence[RewardFunction | str], columns: Sequence[str] | None) -> None:
    """
    Refuses reward functions that cannot be called with what they will be given, before a model is loaded for them.

    Args:
        rewards (`list`): functions; ids and folders of reward models are passed over.
        columns (`list[str]`, *optional*): of the data; a stream may not know them, then nothing is refused.

    Raises:
        ValueError: a function needs what is no column, or cannot take what every function is given; one sentence.
    """
    if columns is None:
        return
    passed_on = [name for name in columns if name not in NOT_PASSED_ON]
    for reward in rewards:
        if not isinstance(reward, str) and (problem := _why_not_callable(reward, passed_on)):
            raise ValueError(f"The reward {reward_name(reward)!r} {problem}")


def _why_not_callable(reward: RewardFunction, passed_on: Sequence[str]) -> str | None:
    """What is wrong with the parameters of a function that is given everything by name."""
    try:
        parameters = list(inspect.signature(reward).parameters.values())
    except (TypeError, ValueError):  # written in C: it does not say
        return None
    if isinstance(reward, functools.partial) and (twice := sorted({*reward.keywords} & {*passed_on})):
        return f"has its {twice[0]!r} set, and would be given the data's column {twice[0]!r} instead: rename one."
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    given = {*passed_on, *_TAKEN, *_ADDED}
    needed = [name for name, p in named.items() if p.default is p.empty]
    if missing := [name for name in needed if name not in given | _SOMETIMES_ADDED]:
        return (
            f"needs {missing[0]!r}, which is no column of the data (beside the prompt it has {passed_on}): add it to "
            "the data, or give the parameter a default."
        )
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not takes_any and (refused := sorted(given - named.keys())):
        return (
            f"takes no {refused[0]!r}, but every reward function is given prompts, completions, their tokens and all "
            "columns by name: end its parameters with `**kwargs`."
        )
    return None


def call_rewards(
    rewards: Sequence[RewardFunction],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[list[int]],
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> torch.Tensor:
    """
    Rewards of completions, each function called once, with all completions.

    Besides the columns a function is given what TRL adds: `trainer_state`, here that of a training that has come to
    its end, and `log_extra` and `log_metric`, which log nothing.

    Args:
        rewards (`list`): K functions, sync or async; async ones run at the same time.
        prompts, completions (`list`): N texts, or lists of messages.
        completion_ids (`list[list[int]]`): N lists of tokens.
        columns (`dict`, *optional*): further columns of the data, N entries each.

    Returns:
        `torch.Tensor`: (N, K) float64; NaN where a function returned `None` or NaN. What an infinite one means is
            said by [`without_infinite`].

    Raises:
        ValueError: a function returns another number of rewards.
    """
    given: dict[str, Any] = {name: column for name, column in (columns or {}).items() if name not in NOT_PASSED_ON}
    given |= {"trainer_state": _finished(), "log_extra": _log_nothing, "log_metric": _log_nothing}
    given |= {"prompts": list(prompts), "completions": list(completions), "completion_ids": list(completion_ids)}
    returned: list[Any] = [None if is_async_callable(reward) else reward(**given) for reward in rewards]
    waiting = [k for k, reward in enumerate(rewards) if is_async_callable(reward)]
    if waiting:
        together = _gather([rewards[k] for k in waiting], given)
        for k, values in zip(waiting, asyncio.run_coroutine_threadsafe(together, _event_loop()).result(), strict=True):
            returned[k] = values
    scores = torch.full((len(completions), len(rewards)), torch.nan, dtype=torch.float64)
    for k, (reward, values) in enumerate(zip(rewards, returned, strict=True)):
        numbers = [math.nan if value is None else float(value) for value in values]
        if len(numbers) != len(completions):
            raise ValueError(
                f"The reward function {reward_name(reward)!r} returned {len(numbers)} rewards for {len(completions)} "
                "completions: return one for each."
            )
        scores[:, k] = torch.tensor(numbers, dtype=torch.float64)
    return scores


def without_infinite(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Leaves out completions with an infinite reward: it says nothing in numbers, and neither do the others without it.

    A completion that one function forbids by `-inf` would otherwise be judged by the rest alone.

    Args:
        rewards (`torch.Tensor`): (..., N, K).

    Returns:
        The rewards, NaN in all of such a row, and which rows these are, boolean (..., N).
    """
    infinite = rewards.isinf().any(dim=-1)
    return rewards.masked_fill(infinite.unsqueeze(-1), torch.nan), infinite


def _finished() -> TrainerState:
    """A state by which a reward that changes during training is the one that training ends with."""
    return TrainerState(epoch=1.0, global_step=1, max_steps=1, num_train_epochs=1)


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """There is no table of completions and no log here."""


async def _gather(rewards: Sequence[RewardFunction], given: Mapping[str, Any]) -> list[Any]:
    return await asyncio.gather(*(reward(**given) for reward in rewards))


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop in a thread of its own, as TRL has it: clients that a reward keeps open live on, and notebooks work."""
    _, loop, ready = start_event_loop_in_daemon(name="trl_bayes-rewards")
    ready.wait()
    return loop
