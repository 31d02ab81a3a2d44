"""What every target promises, as a check to call in the tests of one's own."""

import copy
import io
from collections.abc import Sequence

import torch

from ..prior import Context, PriorScores
from .base import LogPotentialError, Target


def assert_target_contract(
    target: Target, reward_names: Sequence[str] | None = None, *, prior: PriorScores | None = None
) -> None:
    """
    Checks that a target behaves as trainers and samplers rely on; call it in the tests of your own target.

        def test_mine():
            assert_target_contract(Mine(slope=2.0), ["quality", "length"])

    Checked are: one value per completion, of the rewards' dtype; never `+inf` nor above `max_log_potential`, and
    `-inf` only if `hard`; `NaN` for a completion without any reward; the same value in any order and any batch, for
    one completion and for none, and on a second call; rewards left as they were; large rewards; `settings` and `repr`
    that do not change; and a state that survives `torch.save` and restores the target without a second fit. The
    target given is left as it was.

    Args:
        target ([`Target`]): the target to check, bound or not, fitted or not.
        reward_names (`list[str]`, *optional*):
            Names of the reward functions. Defaults to those that the target reads.
        prior ([`PriorScores`], *optional*):
            Completions to check on, where standard normal rewards are not what the target is made for.

    Raises:
        AssertionError: saying what is broken.
    """
    names = list(dict.fromkeys(reward_names or target.names_read())) or ["first", "second"]
    prior = _normal_prior(len(names)) if prior is None else prior
    fresh, checked = copy.deepcopy(target), copy.deepcopy(target)
    description = repr(target)
    _ensure("0x" not in description, f"its `repr` has an address and so differs between runs: {description}")
    _ensure(isinstance(checked.settings(), dict), "`settings()` must return a dictionary")
    checked.bind(names)
    if checked.needs_prior_samples:
        checked.fit(prior)
        _ensure(checked.is_fitted, "`is_fitted` is False after `fit`: a resumed run would fit again")
    try:
        _check_log_potential(checked, prior)
    except LogPotentialError as error:
        raise AssertionError(f"Target contract: {error}") from None
    _check_log_z(checked, prior)
    _check_state(fresh, checked, names, prior)
    _ensure(repr(checked) == description, f"its `repr` changed with use, from {description} to {checked!r}")


def _ensure(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"Target contract: {message}.")


def _normal_prior(num_rewards: int) -> PriorScores:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(3, 256, num_rewards, generator=generator)
    rewards[:, :2] = torch.nan  # some that no function scores
    log_prior = -10 * torch.rand(3, 256, generator=generator) - 1
    return PriorScores(rewards, log_prior, torch.tensor([5, 2**59 + 1, 11]))


def _check_log_potential(target: Target, prior: PriorScores) -> None:
    rewards = prior.rewards.flatten(0, 1)  # (P * N, K)
    context = Context(prior.log_prior.flatten(), prior.keys.repeat_interleave(prior.log_prior.size(1)))
    given = rewards.clone()
    phi = target(rewards, context)
    _check_values(target, phi, rewards)
    _ensure(_same(given, rewards), "it changes the rewards that it is given")
    _ensure(_same(target(rewards, context), phi), "a second call gives other values")

    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(1))
    for rows, name in (
        (order, "in another order"),
        (order[: len(order) // 2], "in a smaller batch"),
        (order[:1], "alone"),
        (order[:0], "in an empty batch"),
    ):
        part = target(rewards[rows], Context(*(values[rows] for values in context)))
        _check_values(target, part, rewards[rows])
        _ensure(_same(part, phi[rows]), f"a completion {name} has another value")

    unscored = target(torch.full_like(rewards, torch.nan), context)
    _check_values(target, unscored, rewards)
    if target.reads_rewards:
        _ensure(
            bool(unscored.isnan().all()),
            "a completion without any reward must have NaN, so that it is left out of the update",
        )
    else:
        _ensure(_same(unscored, phi), "it depends on rewards, although `reads_rewards` is False")
    for size in (-1e4, 1e4):
        large = target(torch.full_like(rewards, size), context)
        _check_values(target, large, rewards)
        _ensure(not large.isnan().any(), f"rewards of {size:g} give NaN, which means 'not scored'")


def _check_values(target: Target, phi: torch.Tensor, rewards: torch.Tensor) -> None:
    _ensure(phi.dtype == rewards.dtype, f"it returns {phi.dtype} for rewards of {rewards.dtype}")
    _ensure(target.hard or not (phi == -torch.inf).any(), "it returns -inf: set `hard = True`, or bound it")
    bound = target.max_log_potential()
    if bound is not None and len(phi):
        largest = phi.nan_to_num(nan=-torch.inf, neginf=-torch.inf).max().item()
        _ensure(largest <= bound + 1e-6, f"it returns {largest:.6g}, above its `max_log_potential` of {bound:.6g}")


def _check_log_z(target: Target, prior: PriorScores) -> None:
    log_z = target.log_z(prior.keys)
    if log_z is not None:
        _ensure(log_z.shape == prior.keys.shape, f"`log_z` returns {tuple(log_z.shape)}, not one per prompt")
        _ensure(bool(log_z.isfinite().all()), "`log_z` is not finite")


def _check_state(fresh: Target, fitted: Target, names: Sequence[str], prior: PriorScores) -> None:
    file = io.BytesIO()
    torch.save(fitted.state_dict(), file)
    file.seek(0)
    fresh.bind(names)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    _ensure(fresh.is_fitted, "`is_fitted` is False after `load_state_dict`: a resumed run would fit again")
    _ensure(
        _same(prior.log_potential(fresh), prior.log_potential(fitted)),
        "restored from its `state_dict` it gives other values",
    )
    _ensure(fresh.diagnostics() == fitted.diagnostics(), "restored from its `state_dict` it has other diagnostics")


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
