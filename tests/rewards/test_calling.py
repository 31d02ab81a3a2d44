"""Rewards have the names and get the arguments that TRL gives them, whatever kind of callable they are."""

import asyncio
import functools
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForSequenceClassification, TrainerState
from trl import GRPOConfig, GRPOTrainer

from trl_bayes.rewards import length_between
from trl_bayes.rewards.calling import (
    call_rewards,
    check_columns,
    check_reward_arguments,
    refuse_same_names,
    reward_name,
    reward_names,
    without_infinite,
)


def plain(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def scaled(completions: list[Any], factor: float, **kwargs: Any) -> list[float]:
    return [factor * len(text) for text in completions]


async def later(completions: list[Any], **kwargs: Any) -> list[float | None]:
    await asyncio.sleep(0)
    return [None, *(float(len(text)) for text in completions[1:])]


class Callable:
    def __call__(self, completions: list[Any], **kwargs: Any) -> list[float]:
        return [2.0 * len(text) for text in completions]


class AsyncCallable:
    async def __call__(self, completions: list[Any], **kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        return [3.0 * len(text) for text in completions]


def of_training(
    completions: list[Any], trainer_state: TrainerState, log_metric: Any, log_extra: Any, **kwargs: Any
) -> list[float]:
    """Needs all that TRL adds, as a reward with a schedule and metrics of its own does."""
    log_metric("share", 0.5)
    log_extra("texts", completions)
    progress = trainer_state.global_step / trainer_state.max_steps if trainer_state.max_steps > 0 else 0
    return [progress] * len(completions)


KINDS: dict[str, Any] = {
    "plain": plain,
    "scaled": functools.partial(functools.partial(scaled), factor=2),
    "later": later,
    "Callable": Callable(),
    "AsyncCallable": AsyncCallable(),
    "of_training": of_training,
    "length_between": length_between(maximum=3, unit="characters"),
}


def test_names_are_those_of_trl(tiny_models: Any, tmp_path: Path) -> None:
    """Also of a reward model, by its folder and as a model."""
    model = LlamaForSequenceClassification.from_pretrained(tiny_models.reward)
    rewards = [*KINDS.values(), model, tiny_models.reward]
    trainer = GRPOTrainer(
        tiny_models.policy,
        reward_funcs=list(rewards),
        args=GRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none"),
        train_dataset=Dataset.from_dict({"prompt": ["a"]}),
    )
    assert [reward_name(reward) for reward in rewards] == trainer.reward_func_names == [*KINDS, "reward", "reward"]


def test_every_kind_is_called() -> None:
    scores = call_rewards(list(KINDS.values()), ["x"] * 2, ["ab", "abcd"], [[1], [1, 2]])
    assert scores.dtype == torch.float64
    expected = [[2, 4], [4, 8], [math.nan, 4], [4, 8], [6, 12], [1, 1], [1, 0]]
    torch.testing.assert_close(scores.T, torch.tensor(expected, dtype=torch.float64), equal_nan=True)


def test_infinity_and_none_are_no_reward() -> None:
    values = [None, math.inf, -math.inf, math.nan, torch.tensor(2.0)]
    scores = call_rewards([lambda **kwargs: values], [""] * 5, [""] * 5, [[]] * 5)
    usable, infinite = without_infinite(scores)
    assert usable[:4].isnan().all() and usable[4] == 2
    assert infinite.tolist() == [False, True, True, False, False]


def test_what_one_function_forbids_is_not_judged_by_the_others() -> None:
    usable, _ = without_infinite(torch.tensor([[1.0, -math.inf], [0.2, 0.0], [0.5, math.nan]]))
    assert usable[0].isnan().all()
    assert usable[1].tolist() == pytest.approx([0.2, 0.0]) and usable[2, 0] == 0.5


def test_columns_of_any_name() -> None:
    """Those that TRL does not hand on, and names that a caller might use for itself."""
    seen: dict[str, Any] = {}
    columns = {name: [name] for name in ("samples", "reward_funcs", "rewards", "columns", "prompt", "completion")}
    columns |= {"completion_ids": ["of the data"], "trainer_state": ["of the data"]}
    call_rewards([lambda **kwargs: seen.update(kwargs) or [0.0]], ["p"], ["c"], [[7]], columns)
    for name in ("samples", "reward_funcs", "rewards", "columns"):
        assert seen[name] == [name]
    assert seen["completion_ids"] == [[7]] and isinstance(seen["trainer_state"], TrainerState)
    assert "prompt" not in seen and "completion" not in seen


def test_async_rewards_share_one_loop_and_wait_for_each_other() -> None:
    """One after the other they would never both arrive; a loop for each call would break clients that are kept."""
    barrier: list[asyncio.Event] = []
    loops = []

    async def meet(number: int, **kwargs: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        barrier.append(asyncio.Event())
        while len(barrier) < 2:
            await asyncio.sleep(0.001)
        return [float(number)]

    for _ in range(2):
        barrier.clear()
        scores = call_rewards([functools.partial(meet, number=k) for k in range(2)], [""], [""], [[]])
        assert scores.tolist() == [[0.0, 1.0]]
    assert len(set(loops)) == 1


def test_inside_a_running_loop_as_in_a_notebook() -> None:
    async def cell() -> torch.Tensor:
        return call_rewards([later], ["", ""], ["", "ab"], [[], []])

    assert asyncio.run(cell())[1, 0] == 2
    assert threading.current_thread() is threading.main_thread()


def test_another_number_of_rewards() -> None:
    async def async_pair(**kwargs: Any) -> list[float]:
        return [0.0, 0.0]

    def pair(**kwargs: Any) -> list[float]:
        return [0.0, 0.0]

    for reward in (pair, async_pair):
        message = f"The reward function '{reward.__name__}' returned 2 rewards for 1 completions"
        with pytest.raises(ValueError, match=message):
            call_rewards([reward], [""], [""], [[]])


def test_two_rewards_of_one_name_are_refused() -> None:
    rewards = [length_between(maximum=3), plain, length_between(maximum=8)]
    message = "Two rewards are called 'length_between'.*by `called` where the reward takes it"
    with pytest.raises(ValueError, match=message) as caught:
        reward_names(rewards)
    assert "\n" not in str(caught.value)
    assert reward_names([rewards[0], length_between(maximum=8, called="short")]) == ["length_between", "short"]
    with pytest.raises(ValueError, match="'a'"):
        refuse_same_names(["b", "a", "a"])


def test_columns_that_are_the_policys_own() -> None:
    check_columns(None)
    check_columns(["prompt", "completion", "answer"])
    with pytest.raises(ValueError, match="The data has a column 'completions'"):
        check_columns(["prompt", "completions"])


def test_what_a_function_cannot_be_called_with() -> None:
    def all_of_it(completions: Any, longest: Any, **kwargs: Any) -> None: ...

    def by_default(completions: Any, longest: Any = 3, environments: Any = None, **kwargs: Any) -> None: ...

    def without_kwargs(completions: Any) -> None: ...

    def every_name(prompts, completions, completion_ids, longest, trainer_state, log_extra, log_metric): ...  # type: ignore

    check_reward_arguments(["a/model", all_of_it, by_default, every_name, max], ["prompt", "completion", "longest"])
    check_reward_arguments([by_default, functools.partial(all_of_it, longest=2)], ["prompt"])
    check_reward_arguments([without_kwargs, all_of_it], None)  # a stream
    with pytest.raises(ValueError, match=r"'all_of_it' needs 'longest', which is no column.*it has \['length'\]"):
        check_reward_arguments([all_of_it], ["prompt", "length"])
    with pytest.raises(ValueError, match="'without_kwargs' takes no 'completion_ids'.*with `\\*\\*kwargs`"):
        check_reward_arguments([by_default, without_kwargs], ["prompt"])
