"""The one file that touches TRL's methods: a GRPOTrainer whose fixed point is a chosen posterior."""

import textwrap
import uuid
import warnings
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.fingerprint import Hasher
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.grpo_trainer import EnvironmentFactory, RewardFunc, RolloutFunc
from trl.trainer.utils import get_config_model_id

from .. import estimators
from ..language_models.fingerprint import model_fingerprint, parameters_fingerprint
from ..partitions import RunningPartition
from ..prior import (
    Completions,
    Draw,
    DrawIdentity,
    PriorSamples,
    PriorSamplesError,
    Work,
    callable_fingerprint,
    prompt_key,
    row_key,
)
from ..prior.drawing import MOVED
from ..targets import Context, PromptTable, Target, build_target
from .exactness import distribution_altering_settings
from .model_card import posterior_section, with_section
from .posterior_config import PosteriorConfig
from .prior import load_prior


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


_MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
"""Inputs of TRL's scorer besides token ids: they come and go with the model's modality."""


class Sequences(NamedTuple):
    """Per-sequence quantities of one micro-batch, each of shape `(B,)`, in nats."""

    log_policy: torch.Tensor  # log pi(y), the current policy's
    log_target: torch.Tensor  # log P(y) = log pi_0(y) + phi(y); -inf outside the support
    log_proposal: torch.Tensor  # log q(y), of the distribution that y was sampled from
    log_z: torch.Tensor  # log Z(x)
    baseline: torch.Tensor  # leave-one-out baseline of the pseudo-reward


class PosteriorTrainer(GRPOTrainer):
    """
    Fine-tunes a language model towards a posterior: the prior updated by evidence, `p ∝ pi_0 exp(phi)`.

    Drop-in for [`~trl.GRPOTrainer`]: the same constructor, datasets, reward functions, tools, PEFT, vLLM options,
    callbacks and checkpoints. The only changes are the loss and what is computed from a group of completions. Each
    completion contributes `c_i grad log pi(y_i)`; a subclass says what `c_i` is ([`~PosteriorTrainer.coefficient`])
    and so how the distance to the posterior is measured and estimated. See [RL with KL penalties is better viewed as
    Bayesian inference](https://huggingface.co/papers/2205.11275).

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
    _paper = {
        "title": "RL with KL penalties is better viewed as Bayesian inference",
        "id": "2205.11275",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{korbak2022rl,
                title        = {{RL with KL penalties is better viewed as Bayesian inference}},
                author       = {Tomasz Korbak and Ethan Perez and Christopher L. Buckley},
                year         = 2022,
                booktitle    = {Findings of the Association for Computational Linguistics: EMNLP 2022},
                eprint       = {arXiv:2205.11275},
            }"""),
    }

    config_class: ClassVar[type[PosteriorConfig]] = PosteriorConfig
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
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
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
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{model_id.split('/')[-1]}-{self._name}")
        if not isinstance(args, self.config_class):
            raise TypeError(
                f"`{type(self).__name__}` takes a `{self.config_class.__name__}` as `args`, got "
                f"`{type(args).__name__}`: change the class name, the fields are the same."
            )
        if target is not None and args.target is not None:
            raise ValueError("The target is given twice, as `target=` and as `args.target`: leave one of them out.")
        self.divergence = args.make_divergence()
        self.target = build_target(args.target if target is None else target, args.beta or None)
        self._refuse_infinite_divergence()
        if ignored := args.ineffective_settings():
            warnings.warn(f"{type(self).__name__} does not clip ratios, so {ignored} have no effect.", stacklevel=2)

        # TRL loads a copy of the starting policy as the prior unless `beta` is zero
        has_own_prior = args.prior_model_name_or_path is not None and args.beta != 0
        beta, args.beta = args.beta, 0.0 if has_own_prior else args.beta
        try:
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
        finally:
            args.beta = beta
        self.beta = beta
        if has_own_prior:
            self.ref_model = cast(PreTrainedModel, load_prior(self, args))
        self._refuse_inexact_model_defaults()
        self.target.bind(self.reward_func_names, self.reward_weights)
        self._refuse_unsampled_prior()
        self._refuse_unknown_evidence()
        self.running_partition = RunningPartition() if args.partition == "running" else None
        self.prior_log_z: PromptTable | None = None  # with `partition="prior_samples"`
        self._latest_rewards = torch.empty(0)  # of the latest generation, all processes: (B_global, K)
        self._latest_completions: list[Any] = []  # of this process, as reward functions are given them

    # ---------------------------------------------------------------------------------------------------------------
    # What a subclass decides

    @abstractmethod
    def coefficient(self, sequences: Sequences) -> torch.Tensor:
        """The factor `c_i` of `grad log pi(y_i)` in the gradient of the loss; no gradient flows through it."""

    def pseudo_reward(self, sequences: Sequences) -> torch.Tensor:
        """What a completion is worth, before the baseline: `-f'(t)` unless a subclass says otherwise."""
        return -self.divergence.slope(log_density_ratio(sequences))

    def baseline(self, group: Sequences, valid: torch.Tensor) -> torch.Tensor:
        """The part of the pseudo-reward that does not depend on the completion itself; all shapes `(P, G)`."""
        return torch.zeros_like(group.log_z)

    def value(self, sequences: Sequences) -> torch.Tensor:
        """What a completion adds to the logged loss: on average `D_f(pi||p)`, in nats."""
        ratio = estimators.finite_exp(sequences.log_policy - sequences.log_proposal)
        return ratio * self.divergence.f_over_t(log_density_ratio(sequences))

    def choose_log_z(self, group: Sequences, valid: torch.Tensor, importance_estimate: torch.Tensor) -> torch.Tensor:
        """The evidence `log Z` that each completion of a group is compared with; all shapes `(P, G)`."""
        return importance_estimate

    # ---------------------------------------------------------------------------------------------------------------
    # Refusals that need the target or the model

    def _refuse_infinite_divergence(self) -> None:
        if self.target.hard and not self.divergence.allows_hard_constraints:
            raise ValueError(
                f"The target {self.target!r} gives some completions no probability, and {self.divergence.name} is "
                "infinite for a policy that produces them: use DPGTrainer, or FDPGTrainer or TrajectoryBalanceTrainer "
                "with `divergence` 'forward_kl' or 'jensen_shannon', or a `tilt` target."
            )

    def _refuse_inexact_model_defaults(self) -> None:
        """A model's own `generation_config` fills in what TRL leaves unset (e.g. `no_repeat_ngram_size`)."""
        if self.use_vllm:
            return  # vLLM is given TRL's settings only
        set_by_trl = {"do_sample", *(name for name, value in self.generation_kwargs.items() if value is not None)}
        own = {k: v for k, v in self.model.generation_config.to_dict().items() if k not in set_by_trl}
        for name, advice in distribution_altering_settings(own).items():
            raise ValueError(
                f"The model's generation_config has `{name}={own[name]}`, which changes the distribution that "
                f"completions are sampled from, but not the one that is scored: {advice} in `model.generation_config`."
            )

    def _refuse_unsampled_prior(self) -> None:
        """Samples of the prior are drawn by the policy before its first update, for the prompts of the data."""
        if not self._needs_prior_samples:
            return
        self.target.warn_of_too_few_samples(self.args.num_prior_samples)
        needs = f"The target {self.target!r}" if self.target.needs_prior_samples else "`partition='prior_samples'`"
        if self.beta == 0:
            raise ValueError(
                f"{needs} needs samples of the prior, and `beta=0` is pure RL, which has none: set `beta` > 0, or use "
                "`partition='running'` and no target."
            )
        if self.args.prior_model_name_or_path is not None:
            raise ValueError(
                f"{needs} needs samples of the prior, which the policy draws before its first update: leave "
                "`prior_model_name_or_path` unset."
            )
        if self.environment_factories is not None:
            raise ValueError(
                f"{needs} needs samples of the prior for each prompt, and an environment may write prompts that the "
                "data does not have: use a target and a `partition` that learn nothing from the prior."
            )
        for dataset in self._datasets():
            if not isinstance(dataset, Dataset):
                raise ValueError(
                    f"{needs} needs samples of the prior for each prompt, so all prompts must be known: use a data "
                    "set that is not streamed."
                )

    def _refuse_unknown_evidence(self) -> None:
        if self.args.partition == "known" and not self._knows_evidence():
            raise ValueError(
                f"The target {self.target!r} does not know its evidence: set `partition` to 'running', "
                "'leave_one_out' or 'prior_samples'."
            )

    def _knows_evidence(self) -> bool:
        try:
            return self.target.log_z(torch.empty(0, dtype=torch.int64)) is not None
        except ValueError:  # it wants to be fitted first, so there is something to know
            return not self.target.is_fitted

    @property
    def _needs_prior_samples(self) -> bool:
        return self.target.needs_prior_samples or self.args.partition == "prior_samples"

    # ---------------------------------------------------------------------------------------------------------------
    # What is learned from samples of the prior, before the first update

    def _datasets(self) -> list[Any]:
        evaluation = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        return [dataset for dataset in (self.train_dataset, *evaluation.values()) if dataset is not None]

    def learn_from_prior(self) -> None:
        """
        Draws samples of the prior for every prompt, and fits the target and `log Z` to them.

        Called before the first generation. The samples are kept in `prior_samples_dir`, so that a second run with the
        same model and prompts draws none, and scores them only if its rewards are others. What is learned across
        prompts is learned from those of the training data, each as often as it occurs there. Neither metrics nor
        torch's random state show that anything was drawn: the training that follows is the same, whether or not the
        samples were already there.

        Raises:
            PriorSamplesError: a `ValueError`: the samples that are kept cannot be read, some are missing in the middle
                of a run, or the target cannot be fitted to them.
            ValueError: the policy is not the prior any more.
        """
        rows: dict[int, dict[str, Any]] = {}
        multiplicity: Counter[int] = Counter()
        for dataset in self._datasets():
            for row in self._remove_unused_columns(dataset):  # as TRL gives them
                rows.setdefault(key := _row_hash(row), row)
                multiplicity[key] += dataset is self.train_dataset
        samples = self._prior_samples(list(rows.values()))
        if len(samples.missing()) and self.state.global_step > 0:
            raise PriorSamplesError(
                f"Samples of the prior are missing in {samples.folder}, and the policy has been trained since: start "
                "again, or resume from a checkpoint with its `posterior_state` files."
            )
        samples.collect(
            self._draw_prior,
            self._score_prior_samples,
            list(rows.values()),
            Work(
                self.accelerator.process_index,
                self.accelerator.num_processes,
                self.accelerator.wait_for_everyone,
                progress=not self.args.disable_tqdm,
            ),
        )
        scores = samples.scores(torch.tensor(list(rows)), torch.tensor([multiplicity[key] for key in rows]))
        if self.target.needs_prior_samples and not self.target.is_fitted:
            with _as_prior_samples_error():
                self.target.fit(scores)
        if self.args.partition == "prior_samples":
            log_z = scores.estimate_log_z(self.target).log_z
            self.prior_log_z = PromptTable.of(scores.keys, log_z)
            if without := int((~log_z.isfinite()).sum()):
                warnings.warn(
                    f"{without} of {len(log_z)} prompts have no prior sample with evidence, so they are left out of "
                    "training: increase `num_prior_samples`, or set `partition='running'`.",
                    stacklevel=2,
                )

    def _prior_samples(self, rows: list[dict[str, Any]]) -> PriorSamples:
        """The folder with samples of the prior for these rows."""
        args = self.args
        pairs = zip(self.reward_funcs, self.reward_processing_classes, strict=True)
        rewards = [callable_fingerprint(function, tokenizer) for function, tokenizer in pairs]
        keys = [row_key(row) for row in rows]
        prompts, images, _ = self._tokenize_prompts([row["prompt"] for row in rows])
        sees_row = images is not None or any({"image", "images"} & row.keys() for row in rows)
        prompt_keys = [prompt_key(ids, key if sees_row else 0) for ids, key in zip(prompts, keys, strict=True)]
        return PriorSamples(
            args.prior_samples_dir or Path(str(args.output_dir)) / "prior_samples",
            self._draw_identity(rewards),
            torch.tensor(prompt_keys, dtype=torch.int64),
            torch.tensor(keys, dtype=torch.int64),
            rewards=rewards,
            num_samples=args.num_prior_samples,
            chunk_size=args.per_device_train_batch_size * (args.steps_per_generation or 1),
        )

    def _draw_identity(self, rewards: list[str | None]) -> DrawIdentity:
        """What is drawn; where that cannot be told, something that no other run has."""
        args, model_id = self.args, get_config_model_id(self.model.config)
        parts = [model_fingerprint(model_id, self.model), *(callable_fingerprint(tool) for tool in self.tools or [])]
        adapter = {name: each for name, each in self.model.named_parameters() if ".ref." in name}
        if adapter:  # a trained adapter is part of the prior, which TRL keeps under this name
            parts.append(parameters_fingerprint(adapter))
        if self.rollout_func is not None:  # it may give the reward functions more than is kept
            parts += [callable_fingerprint(self.rollout_func), *rewards]
        once = broadcast_object_list([uuid.uuid4().hex])[0]
        weights, *tools = [once if part is None else part for part in parts]
        length = cast(int, args.max_completion_length)
        return DrawIdentity(model_id, weights, args.temperature, length, self.eos_token_ids, args.seed, tools)

    def _draw_prior(self, rows: list[dict[str, Any]], seed: int) -> Draw:
        """Completions of the policy, which is still the prior, one for each row, with TRL's generation and rewards."""
        with self._unrecorded():
            output = super()._generate_and_score_completions([dict(row) for row in rows])
        with torch.no_grad():
            log_policy, _, log_prior = self._sequence_log_probs(output).unbind(dim=1)
        self._refuse_policy_that_has_moved((log_policy - log_prior).sum() / own_tokens(output).sum())
        pairs = zip(output["completion_ids"], output["completion_mask"].bool(), strict=True)
        ids = [row[kept].tolist() for row, kept in pairs]
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        messages = [None if isinstance(given, str) else given for given in self._latest_completions]
        return Draw(Completions(ids, texts, messages, log_prior), self._latest_rewards)

    def _score_prior_samples(self, rows: list[dict[str, Any]], kept: Completions) -> torch.Tensor:
        """Rewards `(B_global, K)` of completions that were kept."""
        with self._unrecorded():
            prompts = [row["prompt"] for row in rows]
            return self._calculate_rewards([dict(row) for row in rows], prompts, kept.given, [*kept.completion_ids])

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        """Generation of one completion for each row, that metrics, tables and counters do not show."""
        mode = "train" if self.model.training else "eval"
        metrics, logs = deepcopy(self._metrics[mode]), deepcopy(self._logs)
        tokens, group_sizes = self.state.num_input_tokens_seen, (self.num_generations, self.num_generations_eval)
        # Rows are of any prompts and of any number, where TRL's vLLM client samples one prompt for each group
        self.num_generations = self.num_generations_eval = 1
        try:
            yield
        finally:
            self.num_generations, self.num_generations_eval = group_sizes
            self._metrics[mode], self._logs, self.state.num_input_tokens_seen = metrics, logs, tokens

    def _refuse_policy_that_has_moved(self, distance: torch.Tensor) -> None:
        """By its distance from the prior per token, in nats: what it samples must be samples of the prior."""
        if distance > MOVED:
            raise ValueError(
                f"The policy is {distance:.2g} nats per token from the prior, so it cannot draw samples of the prior: "
                f"start from the weights of {get_config_model_id(self.model.config)!r} as they were loaded, with "
                "adapters that begin at zero."
            )

    # ---------------------------------------------------------------------------------------------------------------
    # From a group of completions to what each of them needs in the loss

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list, completions: list, completion_ids_list: list
    ) -> torch.Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (B_global, K)
        infinite = rewards.isinf()
        self._mode_metrics["posterior/frac_infinite_reward"].append(infinite.any(dim=1).float().mean().item())
        # No evidence can be read from an infinite reward: it is treated like one that does not apply
        self._latest_rewards = rewards.masked_fill(infinite, torch.nan)
        self._latest_completions = completions
        return self._latest_rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._announce_lm_head()
        if self._needs_prior_samples and not self._has_learned_from_prior:
            self.learn_from_prior()
        rows = self._row_hashes(inputs)  # before TRL adds fields to `inputs`
        output = super()._generate_and_score_completions(inputs)
        if rows:
            output["prompt_key"] = self._prompt_keys(rows, output)
        if self._is_scored_by_update and "old_per_token_logps" not in output:
            # TRL shuffles the rows before the update, and groups are rows that stand together
            output["row"] = torch.arange(len(output["completion_ids"]), device=output["completion_ids"].device)
            return output
        with torch.no_grad():
            return output | self._posterior_terms(output)

    @property
    def _is_scored_by_update(self) -> bool:
        """
        Whether the forward pass of the update gives `log q` as well, and no other is needed: the batch is used whole,
        at once, and by the very policy that sampled it.
        """
        steps_per_batch = self.num_iterations * (self.args.steps_per_generation or 1)
        return self.model.training and steps_per_batch == 1 and self.args.disable_dropout

    def _announce_lm_head(self) -> None:
        """
        TRL's scorer reads the LM head's weight from outside its module, and ungathered generation does not: ZeRO-3
        refuses a model that fetches its weights in another order than the last time, unless it knows of this.
        """
        if is_deepspeed_zero3_enabled() and not self.args.ds3_gather_for_generation:
            import deepspeed

            model = cast(Any, self.model).get_base_model() if is_peft_model(self.model) else self.model
            deepspeed.zero.register_external_parameter(model, model.get_output_embeddings().weight)

    def _row_hashes(self, inputs: list[dict[str, Any]]) -> list[int]:
        """Identity of each dataset row, all its columns included: the evidence may depend on any of them."""
        if self.args.partition == "leave_one_out" and not self.target.needs_context:
            return []
        start = self.accelerator.process_index * len(inputs)
        hashes: list[int] = []
        for i, row in enumerate(inputs):
            same_group = i > 0 and (start + i) % self._group_size != 0  # a group repeats one row
            hashes.append(hashes[-1] if same_group else _row_hash(row))
        return hashes

    def _prompt_keys(self, row_hashes: list[int], output: dict[str, Any]) -> torch.Tensor:
        """Identity of each prompt, int64 `(B,)`: its dataset row, and its tokens where an environment wrote it."""
        ids, mask = output["prompt_ids"], output["prompt_mask"].bool()
        if self.environment_factories is not None:
            pairs = zip(row_hashes, ids, mask, strict=True)
            row_hashes = [hash((row, *own[kept].tolist())) for row, own, kept in pairs]
        return torch.tensor(row_hashes, dtype=torch.int64, device=ids.device)

    @property
    def _has_learned_from_prior(self) -> bool:
        fitted = self.target.is_fitted or not self.target.needs_prior_samples
        return fitted and (self.prior_log_z is not None or self.args.partition != "prior_samples")

    @property
    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _posterior_terms(self, output: dict[str, Any], policy: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """
        What concerns whole groups, from all processes: the loss's terms for this process's rows, each `(B,)`.

        Args:
            output (`dict`): a generated batch; its `row` says in which order its rows were generated, if not in this.
            policy (`torch.Tensor`, *optional*): the policy's per-token log-probabilities `(B, T)`, if known already.
        """
        group_size = self._group_size
        local = self._sequence_log_probs(output, policy)  # (B, 3)
        row = output.get("row", torch.arange(local.size(0), device=local.device))
        generated = row.argsort()
        together = self.accelerator.gather(local[generated])  # (B_global, 3)
        log_policy, log_proposal, log_prior = together.view(-1, group_size, 3).unbind(dim=2)
        keys = None  # (B_global,)
        if "prompt_key" in output:
            keys = self.accelerator.gather(output["prompt_key"][generated])
        phi = self._log_potential(log_prior.flatten(), keys).view(-1, group_size)  # (P, G)
        valid = ~phi.isnan()
        log_target = log_prior + phi.masked_fill(~valid, 0.0)
        weights = estimators.log_weights(log_target, log_proposal)
        importance_estimate = self._estimate_log_z(weights, valid, keys)
        zeros = torch.zeros_like(log_target)
        group = Sequences(log_policy, log_target, log_proposal, log_z=zeros, baseline=zeros)
        log_z = self.choose_log_z(group, valid, importance_estimate)  # (P, G)
        usable = valid & log_z.isfinite()  # a prompt without evidence has log Z = -inf
        group = group._replace(log_z=log_z.masked_fill(~usable, 0.0))
        group = group._replace(baseline=self.baseline(group, usable))
        advantages = -self._capped(self._scaled_coefficient(group)).masked_fill(~usable, 0.0)
        self._log_group(group, log_prior, weights, importance_estimate, valid, usable)

        mine = row + self.accelerator.process_index * local.size(0)
        terms = {
            "log_target": log_target,
            "log_proposal": log_proposal,
            "log_z": group.log_z,
            "baseline": group.baseline,
            "usable": usable,
            "advantages": advantages,
        }
        shown = cast("deque[float]", self._logs["advantages"])  # TRL's table of completions ends with this batch
        for _ in range(min(advantages.numel(), len(shown))):
            shown.pop()
        shown.extend(advantages.flatten().tolist())
        return {name: term.reshape(-1)[mine] for name, term in terms.items()}

    def _estimate_log_z(self, weights: torch.Tensor, valid: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        """`log Z` for each completion, `(P, G)`, by the `partition` that the configuration names."""
        if keys is None or self.args.partition == "leave_one_out":
            return estimators.leave_one_out_log_z(weights, valid)
        prompt_keys = keys.view(weights.shape)[:, 0]  # (P,)
        if self.running_partition is None:
            return self._fixed_log_z(prompt_keys).to(weights).unsqueeze(1).expand_as(weights)
        log_z = estimators.leave_one_out_log_z(weights, valid, *self.running_partition.past(prompt_keys))
        if self.model.training:
            self.running_partition.update(prompt_keys, weights, valid)
        return log_z

    def _fixed_log_z(self, prompt_keys: torch.Tensor) -> torch.Tensor:
        """`log Z` of prompts, `(P,)`, that training does not change: from prior samples, or known to the target."""
        if self.prior_log_z is not None:
            return self.prior_log_z.lookup(prompt_keys)
        log_z = self.target.log_z(prompt_keys)
        assert log_z is not None  # the constructor refuses a target that does not know it
        return log_z

    def _sequence_log_probs(self, output: dict[str, Any], policy: torch.Tensor | None = None) -> torch.Tensor:
        """`log pi`, `log q` and `log pi_0` of this process's completions, summed over their own tokens: `(B, 3)`."""
        mask = own_tokens(output)
        if policy is None:
            policy = output.get("old_per_token_logps")
        if policy is None:
            policy = self._score(output)
        proposal = output.get("sampling_per_token_logps")
        # The sampler cannot score a token now and then (NaN): it is taken to agree with the policy there
        proposal = policy if proposal is None else torch.where(proposal.isnan(), policy, proposal)
        # Pure RL has no prior: log P is the evidence alone
        prior = output["ref_per_token_logps"] if self.beta != 0 else torch.zeros_like(policy)
        return (torch.stack([policy, proposal, prior], dim=2).float() * mask.unsqueeze(2)).sum(dim=1)

    def _score(self, output: dict[str, Any]) -> torch.Tensor:
        """The policy's per-token log-probabilities of freshly generated completions, `(B, T)`."""
        args = self.args
        batch_size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        # Unchanged: transformers supplies its defaults for None, not for an empty mapping
        checkpointing = cast("dict[str, Any] | None", args.gradient_checkpointing_kwargs)
        with disable_gradient_checkpointing(self.model, checkpointing):
            logps, _, _ = self._get_per_token_logps_and_entropies(
                self.model, **scorer_inputs(output), batch_size=batch_size
            )
        return logps

    def _log_potential(self, log_prior: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        """`phi` of the latest completions of all processes, `(B_global,)`, checked."""
        rewards = self._latest_rewards
        phi = self.target(rewards, None if keys is None else Context(log_prior, keys))
        if (phi == -torch.inf).any() and not self.divergence.allows_hard_constraints:
            raise ValueError(
                f"The target {self.target!r} returned -inf as log-potential, where {self.divergence.name} is infinite:"
                " choose a divergence that allows it ('forward_kl', 'jensen_shannon'), or a finite penalty."
            )
        return phi

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
        sequences = Sequences(
            log_policy.detach(), inputs["log_target"], inputs["log_proposal"], inputs["log_z"], inputs["baseline"]
        )
        exact = self._scaled_coefficient(sequences)
        coefficient = torch.where(inputs["usable"], self._capped(exact), 0.0)
        value = self.value(sequences)
        value = torch.where(inputs["usable"] & value.isfinite(), value, 0.0)
        # The value of the divergence with the gradient of the estimator; completions left out still count in the mean
        loss = (value + coefficient * (log_policy - log_policy.detach())).mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss
            self._mode_metrics["aux_loss"].append(self.accelerator.gather(aux_loss).mean().item())
        self._log_loss(entropies, mask, (coefficient != exact) & inputs["usable"])
        return loss / self.current_gradient_accumulation_steps if self.model.training else loss

    def _scaled_coefficient(self, sequences: Sequences) -> torch.Tensor:
        """The gradient of `D_f / f''(1)`: all divergences pull equally hard near the posterior, as KL does."""
        return self.coefficient(sequences) / self.divergence.curvature

    def _capped(self, coefficient: torch.Tensor) -> torch.Tensor:
        cap = self.args.pseudo_reward_cap
        return coefficient if cap is None else coefficient.clamp(-cap, cap)

    # ---------------------------------------------------------------------------------------------------------------
    # Metrics

    @property
    def _mode_metrics(self) -> dict[str, list[float]]:
        return self._metrics["train" if self.model.training else "eval"]

    def _log_group(
        self,
        group: Sequences,
        log_prior: torch.Tensor,
        weights: torch.Tensor,
        log_z: torch.Tensor,
        valid: torch.Tensor,
        usable: torch.Tensor,
    ) -> None:
        """Logs where the policy stands. Means over prompts; a prompt for which a quantity is unknown is left out."""
        pseudo_reward = self.pseudo_reward(group)[usable]
        metrics = {
            "posterior/frac_unscored": (~valid).float().mean(),
            "posterior/pseudo_reward_mean": pseudo_reward.mean(),
            "posterior/pseudo_reward_std": (pseudo_reward - pseudo_reward.mean()).square().mean().sqrt(),
        }
        if self.beta != 0:
            log_z = log_z.masked_fill(~(valid & log_z.isfinite()), torch.nan).nanmean(dim=1)  # (P,)
            fit = estimators.divergence_estimates(
                group.log_policy, log_prior, group.log_target, group.log_proposal, log_z, valid
            )
            no_evidence = (weights.masked_fill(~valid, estimators.NEG_INF) == estimators.NEG_INF).all(dim=1)
            metrics |= {
                "posterior/log_z": log_z.nanmean(),
                "posterior/ess": estimators.effective_sample_size(weights, valid).mean(),
                "posterior/frac_no_evidence": no_evidence.float().mean(),
                **{f"posterior/{name}": estimate.nanmean() for name, estimate in fit._asdict().items()},
            }
        for name, value in zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True):
            self._mode_metrics[name].append(value)
        for name, value in self.target.diagnostics().items():
            self._mode_metrics[f"posterior/target/{name}"].append(value)

    def _log_loss(self, entropies: torch.Tensor, mask: torch.Tensor, capped: torch.Tensor) -> None:
        sums = torch.stack([(entropies * mask).sum(), mask.sum(), capped.sum(), mask.new_tensor(capped.numel())])
        entropy, tokens, num_capped, num_sequences = self.accelerator.reduce(sums.float(), reduction="sum").tolist()
        self._mode_metrics["entropy"].append(entropy / max(tokens, 1.0))
        self._mode_metrics["posterior/capped_frac"].append(num_capped / num_sequences)

    # ---------------------------------------------------------------------------------------------------------------
    # Checkpoints

    def posterior_state(self) -> dict[str, Any]:
        """What this process must remember across a restart, besides the model and the optimizer."""
        state: dict[str, Any] = {
            "trainer": type(self).__name__,
            "target_settings": repr(self.target),
            "target": self.target.state_dict(),
        }
        if self.running_partition is not None:
            state["running_partition"] = self.running_partition.state_dict()
        if self.prior_log_z is not None:
            state["prior_log_z"] = self.prior_log_z.state_dict()
        return state

    def load_posterior_state(self, state: dict[str, Any]) -> None:
        """Restores [`~PosteriorTrainer.posterior_state`]; refuses that of another trainer or target."""
        for name, ours in (("trainer", type(self).__name__), ("target_settings", repr(self.target))):
            if state[name] != ours:
                raise ValueError(
                    f"The checkpoint was written by a run with {state[name]}, this one has {ours}: resume with the "
                    "same trainer and target, or start a new run from the checkpoint's weights."
                )
        self.target.load_state_dict(state["target"])
        if self.running_partition is not None and "running_partition" in state:
            self.running_partition.load_state_dict(state["running_partition"])
        if self.args.partition == "prior_samples" and "prior_log_z" in state:
            self.prior_log_z = PromptTable(**state["prior_log_z"])

    def _posterior_state_file(self, checkpoint: str | Path) -> Path:
        return Path(checkpoint) / f"posterior_state_{self.accelerator.process_index}.pt"

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if not self.args.save_only_model:
            # Before TRL writes the rest: a checkpoint that a kill leaves without this file is not a complete one
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(self.posterior_state(), self._posterior_state_file(folder))
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        files = [self._posterior_state_file(checkpoint), Path(checkpoint) / "posterior_state_0.pt"]
        file = next((file for file in files if file.exists()), None)
        if file is None:
            warnings.warn(f"{files[0]} is missing: what was learned about the evidence starts afresh.", stacklevel=2)
            return
        state = torch.load(file, weights_only=True)
        if file != files[0]:  # more processes than before: all that they know is the same, but not what they replay
            state.pop("replay_buffer", None)
        self.load_posterior_state(state)

    # ---------------------------------------------------------------------------------------------------------------
    # The model card

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's model card, and in it which posterior the model was trained towards and where it stands."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        file = Path(str(self.args.output_dir)) / "README.md"
        section = posterior_section(
            repr(self.target) if self.beta != 0 else "the largest reward (pure RL, no prior)",
            self.divergence.name,
            self.args.partition,
            self.state.log_history,
        )
        file.write_text(with_section(file.read_text(encoding="utf-8"), section), encoding="utf-8")


def log_density_ratio(sequences: Sequences) -> torch.Tensor:
    """`log t = log pi - log p`, in nats; `+inf` outside the posterior's support."""
    return sequences.log_policy - sequences.log_target + sequences.log_z


@contextmanager
def _as_prior_samples_error() -> Iterator[None]:
    """Tells what a user can set right, for the command line to say in one sentence, from errors in the code."""
    try:
        yield
    except ValueError as error:
        raise PriorSamplesError(str(error)) from error


def _row_hash(row: dict[str, Any]) -> int:
    return int(Hasher.hash(row)[:15], 16)


def own_tokens(inputs: dict[str, Any]) -> torch.Tensor:
    """Mask `(B, T)` of the tokens that the policy itself produced: completions without padding and tool results."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def scorer_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of TRL's scorer from the tensors of a batch."""
    return {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        "logits_to_keep": inputs["completion_ids"].size(1),
        **{name: inputs[name] for name in _MODEL_INPUTS if name in inputs},
    }
