"""Learning from pairs of a completion of the policy and one of the prior, which are ordered by rewards or a judge."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from datasets import Dataset, IterableDataset
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl.trainer.grpo_trainer import EnvironmentFactory, RewardFunc, RolloutFunc

from ..estimators import Preference, bradley_terry, larger_wins
from ..rewards.calling import without_infinite
from ..targets import Target
from ..targets.base import weighted_sum
from .batches import own_tokens, scorer_inputs, sequence_log_probs
from .judge import Judge, ask, refuse_uncallable
from .learning_from_prior import GIVEN, REWARDS
from .metrics import mean_over_processes, show_advantages, token_kl
from .pairs import (
    batch_of_pairs,
    by_pairs,
    completions_of,
    generated_batch,
    generation_metrics,
    in_generated_order,
    loss_metrics,
    pair_terms,
)
from .posterior_trainer import EvalDataset
from .prior_share import PriorShareTrainer


if TYPE_CHECKING:
    from collections import deque

    from peft import PeftConfig, PeftModel

ORDERINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "bradley_terry": bradley_terry,
    "larger_reward": larger_wins,
}
"""How the rewards of two completions become the probability that the first is preferred."""


def judged_only(completions: list[Any], **kwargs: Any) -> list[float | None]:
    """Stands in for reward functions where a judge orders the pairs: TRL wants one."""
    return [0.0] * len(completions)


class MissingEOS:
    """
    The reward `-penalty` for a completion whose own tokens have no end-of-sequence token, else 0.

    Args:
        penalty (`float`): in units of reward.
        eos_token_ids (`list[int]`): tokens that end a completion.
    """

    def __init__(self, penalty: float, eos_token_ids: list[int]):
        self.penalty, self.eos_token_ids = penalty, list(eos_token_ids)
        self.__name__ = "missing_eos"

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        return [0.0 if ids and ids[-1] in self.eos_token_ids else -self.penalty for ids in completion_ids]


class PreferenceTrainer(PriorShareTrainer):
    """
    A [`PriorShareTrainer`] whose groups alternate between completions of the policy and of the prior.

    From generation on a pair is one row of a batch.

    Args:
        judge ([`~trl_bayes.trainers.judge.Judge`], *optional*):
            Orders the pairs in place of the reward functions, which may then be left out.

    All other arguments are those of [`PosteriorTrainer`].
    """

    makes_target: ClassVar[bool] = True
    args: Any
    estimator: Preference

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: EvalDataset | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: "PeftConfig | None" = None,
        tools: list[Callable] | None = None,
        rollout_func: RolloutFunc | None = None,
        environment_factory: EnvironmentFactory | dict[str, EnvironmentFactory] | None = None,
        *,
        target: Target | str | dict[str, Any] | None = None,
        judge: Judge | None = None,
    ):
        refuse_other_tokens(tools, rollout_func, environment_factory)
        refuse_judge(judge, reward_funcs, args)
        self.judge, self._has_rewards = judge, judge is None or reward_funcs is not None
        super().__init__(
            model=model,
            reward_funcs=reward_funcs if self._has_rewards else judged_only,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            target=target,
        )
        self._penalize_missing_eos()

    def _penalize_missing_eos(self) -> None:
        """The penalty as one more reward function, so that it is logged and part of the posterior."""
        if self.args.missing_eos_penalty is None:
            return
        penalty = MissingEOS(self.args.missing_eos_penalty, self.eos_token_ids)
        self.reward_funcs: list[RewardFunc] = [*self.reward_funcs, penalty]
        self.reward_func_names = [*self.reward_func_names, penalty.__name__]
        self.reward_processing_classes: list[Any] = [*self.reward_processing_classes, None]
        self.reward_weights = torch.cat([self.reward_weights, torch.ones(1)])
        self.target.bind(self.reward_func_names, self.reward_weights)

    @property
    def _num_of_prior(self) -> int:
        return self._group_size // 2  # every second one, in evaluation too

    # ---------------------------------------------------------------------------------------------------------------
    # From a group of completions to pairs

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        return batch_of_pairs(super()._generate_and_score_completions(inputs))

    def _generate_with_rewards(self, inputs: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        output, rows = super()._generate_with_rewards(inputs)
        if self._of_prior is None:
            return output, rows
        ids, mask = output["completion_ids"], output["completion_mask"].bool()
        last = mask.sum(dim=1, keepdim=True) - 1
        output["ended"] = torch.isin(ids.gather(1, last), torch.tensor(self.eos_token_ids, device=ids.device)).squeeze(
            1
        )
        rewards, _ = without_infinite(output["rewards"])
        scores = weighted_sum(rewards, self.reward_weights)
        by_others = rewards if self.args.missing_eos_penalty is None else rewards[:, :-1]
        output["scores"] = scores.masked_fill(by_others.isnan().all(dim=1), torch.nan)
        if not self._has_rewards:
            output["scores"] = torch.full_like(output["scores"], torch.nan)
        output["preference"] = self._preference(output["scores"], rows)
        return output, rows

    def _preference(self, scores: torch.Tensor, rows: list[dict[str, Any]]) -> torch.Tensor:
        """The probability that the policy's completion of each pair is preferred, `(M,)`; `NaN` where none can say."""
        if self.judge is None:
            own, others = by_pairs(scores).unbind(dim=1)
            return ORDERINGS[self.args.ordering](own, others)
        given = [row[GIVEN] for row in rows]
        inner = ("prompt", GIVEN, REWARDS)
        columns = {name: [row[name] for row in rows[0::2]] for name in rows[0] if name not in inner}
        prompts = [row["prompt"] for row in rows[0::2]]
        verdicts = ask(self.judge, prompts, list(zip(given[0::2], given[1::2], strict=True)), columns)
        return verdicts.to(scores)

    def _posterior_terms(self, output: dict[str, Any], policy: torch.Tensor) -> dict[str, torch.Tensor]:
        if self._has_rewards:
            super()._posterior_terms(output, policy)  # which checks, and logs where the policy stands
        else:  # there is no posterior of rewards to stand near
            self._check_log_probs(output, policy)
            self._log(token_kl(policy, output, self.accelerator))
        log_policy = by_pairs(sequence_log_probs(output, policy)[:, 0])
        terms = pair_terms(output)
        log_ratio = log_policy - terms.log_prior
        self._log(generation_metrics(output | terms._asdict(), log_ratio, log_policy, self.accelerator))
        factors = self.estimator.pairwise.factors(log_policy, terms, self._alpha)
        advantages = self.accelerator.gather(-factors.flatten())
        show_advantages(cast("deque[float]", self._logs["advantages"]), advantages)
        return terms._asdict()

    # ---------------------------------------------------------------------------------------------------------------
    # The loss

    @property
    def _alpha(self) -> float:
        """The weight of the bonus in this epoch."""
        return self.args.alpha_of(self.state.epoch or 0.0)

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        batch = completions_of(inputs, self._tokenizer.pad_token_id)
        logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(
            model, **scorer_inputs(batch), compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
        )
        log_policy = (logps * batch["completion_mask"]).sum(dim=1).view(2, -1).T  # (M, 2)
        if "row" in inputs:
            with torch.no_grad():
                self._posterior_terms(generated_batch(inputs), in_generated_order(logps.detach(), inputs))
            del inputs["row"]  # a second look at the same batch logs nothing of it again
        terms = pair_terms(inputs)
        parts = self.estimator.pairwise.losses(log_policy, terms, self._alpha)
        loss = (parts[0] + parts[1]).mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss
            self._mode_metrics["aux_loss"].append(self.accelerator.gather(aux_loss).mean().item())
        self._log({"entropy": mean_over_processes(entropies, own_tokens(batch), self.accelerator)})
        self._log(loss_metrics(log_policy, terms, parts, self.estimator.pairwise, self.accelerator))
        self._log({"alpha": self._alpha, "beta": self.estimator.pairwise.beta})
        return loss / self.current_gradient_accumulation_steps if self.model.training else loss


def refuse_other_tokens(tools: Any, rollout_func: Any, environment_factory: Any) -> None:
    """
    Refuses what writes into completions: kept samples of the prior are the prior's own tokens alone.

    Raises:
        ValueError: one sentence.
    """
    given = {"tools": tools, "rollout_func": rollout_func, "environment_factory": environment_factory}
    if names := [f"`{name}`" for name, value in given.items() if value]:
        raise ValueError(
            f"Pairs with the prior keep the prior's own tokens, and {' and '.join(names)} would write others into "
            "them: leave it out, or use KLRLTrainer."
        )


def refuse_judge(judge: Any, reward_funcs: Any, args: Any) -> None:
    """
    Refuses a judge that cannot be called, or a penalty that it leaves nothing to subtract from.

    Raises:
        TypeError, ValueError: one sentence.
    """
    if judge is None:
        if reward_funcs is None:
            raise ValueError("Somebody must say which completion of a pair is better: give `reward_funcs` or `judge`.")
        return
    refuse_uncallable(judge)
    if getattr(args, "missing_eos_penalty", None) is not None:  # a config of another class is refused with the rest
        raise ValueError(
            "`missing_eos_penalty` is subtracted from rewards, and a judge orders the pairs without them: leave it "
            "unset, and let the judge prefer completions that end."
        )
