"""What all trainers share: a GRPOTrainer whose fixed point is a chosen posterior."""

from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.grpo_trainer import EnvironmentFactory, RewardFunc, RolloutFunc

from ..estimators import Estimator, Terms
from ..partitions import PARTITIONS
from ..prior import Draw, KeptCompletions
from ..rewards.calling import without_infinite
from ..targets import Target, build_target
from .batches import gather_group, own_tokens, prompt_keys, row_hashes, scorer_inputs, sequence_log_probs
from .checkpoints import check_same_run, evidence_identity, read_state, run_identity, save_state
from .further_data import all_data, known_data, learn_of_further_data, rows_of
from .learning_from_prior import GIVEN, REWARDS, as_draw, learn, unrecorded
from .log_prob_check import refuse_inexact
from .metrics import group_metrics, loss_metrics, show_advantages, token_kl
from .model_card import add_section
from .posterior_config import PosteriorConfig
from .prior_model import make_exact, prior_of_its_own
from .refusals import (
    check_arguments,
    check_constructed,
    refuse_early,
    refuse_infinite_divergence,
    refuse_infinite_potential,
    refuse_too_few_prompts,
)
from .warnings_of_users import warnings_at_the_users_line
from .zero3 import announce_lm_head


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


EvalDataset: TypeAlias = (
    Dataset | IterableDataset | DatasetDict | IterableDatasetDict | dict[str, Dataset | IterableDataset]
)


class PosteriorTrainer(GRPOTrainer):
    """
    Fine-tunes a language model towards a posterior: the prior updated by evidence, `p ∝ pi_0 exp(phi)`.

    Drop-in for [`~trl.GRPOTrainer`]: the same constructor, datasets, reward functions, tools, PEFT, vLLM options,
    callbacks and checkpoints. The only changes are the loss and what is computed from a group of completions. Each
    completion contributes `c_i grad log pi(y_i)`; a subclass names the [`~trl_bayes.estimators.Estimator`] that says
    what `c_i` is, and so how the distance to the posterior is measured and estimated. See [RL with KL penalties is
    better viewed as Bayesian inference](https://huggingface.co/papers/2205.11275).

    The loss that is logged is the estimate of the divergence `D_f(pi||p)` itself, in nats. Its gradient is divided by
    `f''(1)` (1 for both KL divergences, 1/4 for Jensen-Shannon), so that learning rates and gradient clipping carry
    over from one divergence to another.

    Args:
        args ([`PosteriorConfig`], *optional*):
            Configuration. All other arguments are those of [`~trl.GRPOTrainer`], in the same order.
        target ([`~trl_bayes.targets.Target`], `str` or `dict`, *optional*):
            The posterior to approximate. Defaults to `args.target`, and then to `Tilt(beta=args.beta)` over the
            weighted sum of the rewards.

    Raises:
        ValueError: before any model is loaded, if the target and the divergence do not go together.
    """

    _tag_names = ["trl", "trl-bayes"]
    _name = "Posterior"

    config_class: ClassVar[type[PosteriorConfig]] = PosteriorConfig
    makes_target: ClassVar[bool] = False  # from its configuration, so that it takes no other
    args: PosteriorConfig
    model: PreTrainedModel
    num_generations: int
    num_generations_eval: int

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: PosteriorConfig | None = None,
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
    ):
        args = check_arguments(type(self), args, model, target)
        self.estimator = self.make_estimator(args)
        self.target = build_target(args.target if target is None else target, args.beta or None)
        refuse_infinite_divergence(self.target, self.estimator.divergence)
        self.partition = PARTITIONS[args.partition](self.target)
        refuse_early(self, args, all_data(train_dataset, eval_dataset), environment_factory, tools or rollout_func)
        with prior_of_its_own(self, args), warnings_at_the_users_line():
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
                rollout_func=rollout_func,
                environment_factory=environment_factory,
            )
        make_exact(self.model, self.ref_model, self.accelerator, without_noise=args.disable_dropout)
        check_constructed(self)
        self.data = known_data(self)
        self.target.bind(self.reward_func_names, self.reward_weights)
        self._is_checked = not args.check_log_probs
        self._mode_of_generation: bool | None = None

    @abstractmethod
    def make_estimator(self, args: PosteriorConfig) -> Estimator:
        """The estimator of the gradient: all that makes one trainer another."""

    # ---------------------------------------------------------------------------------------------------------------
    # What is learned from samples of the prior, before the first update

    @property
    def has_learned(self) -> bool:
        """Whether nothing is left to be learned from samples of the prior."""
        return self.partition.is_ready and self.target.is_fitted

    def learn_from_prior(self, again: bool = False) -> None:
        """
        Draws samples of the prior for every prompt, and fits the target and `log Z` to them.

        Called before the first generation; see `learning_from_prior`. The training that follows is the same, whether
        or not the samples were already there.

        Raises:
            PriorSamplesError: the samples that are kept are of something else, or cannot be fitted to; a `ValueError`.
            ValueError: the policy is not the prior any more.
        """
        learn(self, rows_of(self), again)

    def _draw_prior(self, rows: list[dict[str, Any]], seed: int) -> Draw:
        """Completions of the policy, which is still the prior, one for each row, with TRL's generation and rewards."""
        with unrecorded(self):
            output, generated = self._generate_with_rewards(rows)
        return as_draw(output, self._policy_scores(output), generated, self)

    def _score_prior_samples(self, rows: list[dict[str, Any]], kept: KeptCompletions) -> torch.Tensor:
        """Rewards `(B_global, K)` of completions that were kept."""
        with unrecorded(self):
            prompts = [row["prompt"] for row in rows]
            return super()._calculate_rewards([dict(row) for row in rows], prompts, kept.given, [*kept.completion_ids])

    # ---------------------------------------------------------------------------------------------------------------
    # From a group of completions to what each of them needs in the loss

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list, completions: list, completion_ids_list: list
    ) -> torch.Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (B_global, K)
        usable, infinite = without_infinite(rewards)
        self._mode_metrics["posterior/frac_infinite_reward"].append(infinite.float().mean().item())
        start = self.accelerator.process_index * len(inputs)
        for row, own, completion in zip(inputs, rewards[start : start + len(inputs)], completions, strict=True):
            row |= {REWARDS: own, GIVEN: completion}
        return usable

    def _generate_with_rewards(self, inputs: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """TRL's generated batch, and in it `rewards` `(B, K)`; and its rows, with what reward functions were given."""
        rows = [dict(row) for row in inputs]  # TRL adds fields to them, and so does `_calculate_rewards`
        # Taken once: with continuous batching TRL's generation leaves the model in training mode, in evaluation too
        training = self._mode_of_generation = self.model.training
        try:
            output = super()._generate_and_score_completions(rows)
        finally:
            self._mode_of_generation = None
            if self.model.training != training:
                self.model.train(training)
        output["rewards"] = torch.stack([row[REWARDS] for row in rows])
        if self.mask_truncated_completions:  # whose tokens TRL has masked: they are no outcomes
            output["rewards"][~output["completion_mask"].any(dim=1)] = torch.nan
        return output, rows

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        announce_lm_head(self.model, self.args)
        if not self.has_learned:
            self.learn_from_prior()
        output, _ = self._generate_with_rewards(inputs)
        if self.partition.needs_prompt_keys or self.target.needs_context:
            hashes = row_hashes(inputs, self.accelerator.process_index * len(inputs), self._group_size)
            output["prompt_key"] = prompt_keys(hashes, output, self.environment_factories is not None)
        if self._is_scored_by_update and "old_per_token_logps" not in output:
            # TRL shuffles the rows before the update, and groups are rows that stand together
            output["row"] = torch.arange(len(output["completion_ids"]), device=output["completion_ids"].device)
            return output
        with torch.no_grad():
            return output | self._posterior_terms(output, self._policy_scores(output))

    @property
    def _is_scored_by_update(self) -> bool:
        """
        Whether the forward pass of the update gives `log q` as well, and no other is needed: the batch is used whole,
        at once, and by the very policy that sampled it.
        """
        return self.model.training and self.args.steps_per_batch == 1 and self.args.disable_dropout

    @property
    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _posterior_terms(self, output: dict[str, Any], policy: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        What concerns whole groups, from all processes: the loss's terms for this process's rows, each `(B,)`.

        Args:
            output (`dict`): a generated batch; its `row` says in which order its rows were generated, if not in this.
            policy (`torch.Tensor`): the policy's per-token log-probabilities `(B, T)`.
        """
        self._check_log_probs(output, policy)
        local = sequence_log_probs(output, policy)  # (B, 3)
        row = output.get("row", torch.arange(local.size(0), device=local.device))
        group = gather_group(local, output, row.argsort(), self._group_size, self.target, self.accelerator)
        refuse_infinite_potential(group.phi, self.target, self.estimator.divergence)
        log_z = self.partition.log_z(group)
        terms = self.estimator.terms(group, log_z, self.args.pseudo_reward_cap)
        self._log(group_metrics(group, terms, log_z, self.estimator, self.target))
        self._log(token_kl(policy, output, self.accelerator))
        show_advantages(cast("deque[float]", self._logs["advantages"]), terms.advantages)
        if self.model.training:
            self.partition.update(group)
        mine = row + self.accelerator.process_index * local.size(0)
        return {name: term.reshape(-1)[mine] for name, term in terms._asdict().items()}

    def _check_log_probs(self, output: dict[str, Any], policy: torch.Tensor) -> None:
        if not self._is_checked:  # once, before the first update
            refuse_inexact(self, self._score, output, policy)
        self._is_checked = True

    def _policy_scores(self, output: dict[str, Any]) -> torch.Tensor:
        """The policy's per-token log-probabilities of freshly generated completions, `(B, T)`."""
        scored = output.get("old_per_token_logps")
        return self._score(self.model, output) if scored is None else scored

    def _score(self, model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """TRL's scoring of a batch by a model, `(B, T)`, without gradient."""
        args = cast(Any, self.args)
        batch_size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        with torch.no_grad(), disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs):
            return self._get_per_token_logps_and_entropies(model, **scorer_inputs(batch), batch_size=batch_size)[0]

    # ---------------------------------------------------------------------------------------------------------------
    # The loss

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        mask = own_tokens(inputs)
        logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(
            model, **scorer_inputs(inputs), compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
        )
        log_policy = (logps * mask).sum(dim=1)  # (B,)
        if "row" in inputs:
            with torch.no_grad():
                inputs |= self._posterior_terms(inputs, logps.detach())
            del inputs["row"]  # a second look at the same batch finds the terms in it
        terms = Terms(*(inputs[name] for name in Terms._fields))
        loss, capped = self.estimator.loss(log_policy, terms, self.args.pseudo_reward_cap)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss
            self._mode_metrics["aux_loss"].append(self.accelerator.gather(aux_loss).mean().item())
        self._log(loss_metrics(entropies, mask, capped, self.accelerator))
        return loss / self.current_gradient_accumulation_steps if self.model.training else loss

    def evaluate(self, eval_dataset: EvalDataset | str | None = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's evaluation, on any data: what must be known of its prompts is learned first, if it still can be."""
        learn_of_further_data(self, eval_dataset)
        return super().evaluate(cast(Any, eval_dataset), *args, **kwargs)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> torch.utils.data.Sampler:
        refuse_too_few_prompts(self.train_dataset if dataset is None else dataset, self.args)
        return super()._get_train_sampler(dataset)

    # ---------------------------------------------------------------------------------------------------------------
    # Metrics

    @property
    def _mode_metrics(self) -> dict[str, list[float]]:
        training = self.model.training if self._mode_of_generation is None else self._mode_of_generation
        return self._metrics["train" if training else "eval"]

    def _log(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._mode_metrics[name].append(value)

    # ---------------------------------------------------------------------------------------------------------------
    # Checkpoints and the model card

    def posterior_state(self) -> dict[str, Any]:
        """What this process must remember across a restart, besides the model and the optimizer."""
        return {
            **run_identity(type(self), self.target, self.args),
            **evidence_identity(self),
            "target": self.target.state_dict(),
            "partition": {self.partition.name: self.partition.state_dict()},
        }

    def load_posterior_state(self, state: dict[str, Any]) -> None:
        """Restores [`~PosteriorTrainer.posterior_state`]; refuses that of another trainer or target."""
        check_same_run(state, run_identity(type(self), self.target, self.args) | evidence_identity(self))
        self.target.load_state_dict(state["target"])
        if self.partition.name in state["partition"]:
            self.partition.load_state_dict(state["partition"][self.partition.name])

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if not self.args.save_only_model:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            save_state(folder, self.accelerator.process_index, self.posterior_state())
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and (state := read_state(checkpoint, self.accelerator.process_index)) is not None:
            self.load_posterior_state(state)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's model card, and in it which posterior the model was trained towards and where it stands."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            card = Path(str(self.args.output_dir)) / "README.md"
            add_section(card, self.estimator, self.target, self.args, self.state, self.model.config)
