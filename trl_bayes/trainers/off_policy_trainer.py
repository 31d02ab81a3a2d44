"""Completions of earlier policies and of the prior, for the losses that stay exact under them."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from .posterior_config import PosteriorConfig
from .prior_share import PriorShareTrainer
from .replay_buffer import ReplayBuffer, append_rows, refresh


@dataclass
class OffPolicyConfig(PosteriorConfig):
    r"""
    Configuration shared by the trainers whose loss needs no on-policy samples.

    This class includes only the parameters that control who samples completions. For the others see
    [`PosteriorConfig`] and [`~trl.GRPOConfig`].

    Parameters:
        replay_buffer_size (`int`, *optional*, defaults to `0`):
            Number of past completions that each process keeps, with their recorded `log q`. 0 keeps none. Replay
            needs fewer samples where a policy moves in small steps, `num_iterations` more often: see "How close to the
            limit" in the documentation.
        replay_ratio (`float`, *optional*, defaults to `1.0`):
            Replayed completions added to a generated batch, per fresh one. The micro-batches of the update grow by
            this factor, once the buffer holds enough.
        prior_fraction (`float`, *optional*, defaults to `0.0`):
            Share of each group's completions that the prior samples, rounded to whole ones, such as `0.25`. They keep
            what the policy has lost in sight, and bound the importance weights. They are chosen at random, at each
            visit anew, from `num_prior_samples` for each prompt of the training data, which are drawn before the
            first update. All completions are weighted by the density of the mixture.
            Evaluation is the policy's alone; `reward`, `completions/*` and `entropy` of training are of all.
    """

    replay_buffer_size: int = field(
        default=0,
        metadata={"help": "Number of past completions that each process keeps for replay. 0 keeps none."},
    )
    replay_ratio: float = field(
        default=1.0,
        metadata={"help": "Replayed completions added to a generated batch, per fresh one."},
    )
    prior_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of each group's completions that the prior samples, such as 0.25."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_replay()
        self._check_prior_fraction()

    def _check_replay(self) -> None:
        if self.replay_buffer_size < 0:
            raise ValueError(
                f"`replay_buffer_size={self.replay_buffer_size}` must not be negative: 0 means no replay."
            )
        if self.replay_buffer_size == 0:
            return
        if not self.replay_ratio > 0:
            raise ValueError(
                f"`replay_ratio={self.replay_ratio}` must be positive: 0 replay is `replay_buffer_size=0`."
            )
        if self.replay_buffer_size < self.num_replayed:
            raise ValueError(
                f"`replay_buffer_size={self.replay_buffer_size}` holds fewer completions than the {self.num_replayed} "
                "that `replay_ratio` adds to each batch: increase the size or lower the ratio."
            )

    def _check_prior_fraction(self) -> None:
        if not 0 <= self.prior_fraction < 1:  # also refuses NaN
            raise ValueError(
                f"`prior_fraction={self.prior_fraction}` is no share of a group: set it to at least 0 and below 1."
            )
        if self.prior_fraction == 0:
            return
        group_size, number = cast(int, self.num_generations), self.num_of_prior
        if not 0 < number < group_size:
            raise ValueError(
                f"`prior_fraction={self.prior_fraction}` of `num_generations={group_size}` is {number} completions, "
                "and a group needs some of the prior and some of the policy: set another fraction, or a larger "
                "`num_generations`."
            )
        of_process = self.per_device_train_batch_size * (self.steps_per_generation or 1)
        if of_process * number % group_size:
            raise ValueError(
                f"`prior_fraction={self.prior_fraction}` is {number} of {group_size} completions, which cannot be "
                f"spread evenly over the {of_process} that each process generates: make "
                "`per_device_train_batch_size * steps_per_generation` a multiple of "
                f"{group_size // math.gcd(number, group_size)}."
            )

    @property
    def num_of_prior(self) -> int:
        """Completions of each group that the prior samples."""
        return round(self.prior_fraction * cast(int, self.num_generations))

    @property
    def share_of_prior(self) -> str | None:
        return f"prior_fraction={self.prior_fraction}" if self.prior_fraction > 0 else None

    @property
    def keeps_text(self) -> str | None:
        replays = f"`replay_buffer_size={self.replay_buffer_size}`" if self.replay_buffer_size > 0 else None
        return f"`{self.share_of_prior}`" if self.share_of_prior is not None else replays

    @property
    def num_replayed(self) -> int:
        """Replayed completions per generated batch and process: a multiple of `steps_per_generation`."""
        per_step = round(self.replay_ratio * self.per_device_train_batch_size)
        return max(per_step, 1) * (self.steps_per_generation or 1)

    @property
    def reuses_samples(self) -> bool:
        """Whether a completion is used after the policy that sampled it has been updated."""
        return self.replay_buffer_size > 0 or self.gradient_accumulation_steps % self.steps_per_batch != 0


class OffPolicyTrainer(PriorShareTrainer):
    """
    A trainer that can take a share of each group from the prior, and add completions of earlier policies to each
    batch, all with their recorded `q`.
    """

    args: OffPolicyConfig
    config_class = OffPolicyConfig

    @cached_property
    def replay_buffer(self) -> ReplayBuffer | None:
        """Past completions of this process; `None` where none are kept."""
        size = self.args.replay_buffer_size
        return ReplayBuffer(size, self.args.seed + self.accelerator.process_index) if size > 0 else None

    @property
    def _num_of_prior(self) -> int:
        of_pairs = super()._num_of_prior  # which have a share of their own
        return of_pairs or (self.args.num_of_prior if self.model.training else 0)

    @property
    def _samples_prior(self) -> bool:
        return super()._samples_prior or self.args.num_of_prior > 0

    @property
    def _is_scored_by_update(self) -> bool:
        return super()._is_scored_by_update and self.replay_buffer is None  # it keeps `log q` of whole batches

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.replay_buffer is None or not self.model.training:
            return output
        fresh = output
        if len(self.replay_buffer) >= self.args.num_replayed:
            rows = self.replay_buffer.sample(self.args.num_replayed)
            output = append_rows(fresh, rows, self._tokenizer.pad_token_id)
            refresh(output, len(fresh["usable"]), self.partition, self.estimator)
        self._log({"posterior/replayed_frac": 1 - len(fresh["usable"]) / len(output["usable"])})
        self.replay_buffer.add(fresh)
        return output

    def posterior_state(self) -> dict[str, Any]:
        state = super().posterior_state()
        if self.replay_buffer is not None:
            state["replay_buffer"] = self.replay_buffer.state_dict()
        return state

    def load_posterior_state(self, state: dict[str, Any]) -> None:
        super().load_posterior_state(state)
        if self.replay_buffer is None or "replay_buffer" not in state:
            return
        if self.partition.name not in state["partition"]:
            (before,) = state["partition"]
            raise ValueError(
                f"The checkpoint's completions for replay were drawn with `partition={before!r}`, and "
                f"`partition={self.partition.name!r}` knows nothing of log Z of their prompts: resume with the same "
                "`partition`, or with `replay_buffer_size=0`."
            )
        self.replay_buffer.load_state_dict(state["replay_buffer"])
