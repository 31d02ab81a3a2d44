"""Settings under which the fixed point is not the posterior: what each does, and why not."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from trl import GRPOConfig


_EXACT_VALUES: dict[str, tuple[Any, ...]] = {
    "do_sample": (True,),
    "num_beams": (1,),
    "temperature": (),  # TRL scores with the config's own `temperature`: it must be set there
    "top_p": (1.0,),
    "top_k": (0,),
    "min_p": (0.0,),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_tokens": (0,),
    "bad_words_ids": (),
    "bad_words": (),
    "force_words_ids": (),
    "constraints": (),
    "allowed_token_ids": (),
    "prefix_allowed_tokens_fn": (),
    "structured_outputs": (),
    "guided_decoding": (),
    "dola_layers": (),
    "logits_processor": (),
    "logits_processors": (),
    "sequence_bias": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "penalty_alpha": (0.0,),
    "logit_bias": (),
    # Where a completion stops: TRL scores what stands behind by its own stop tokens, as if it had been sampled
    "eos_token_id": (),
    "stop_strings": (),
    "stopping_criteria": (),
    "max_time": (),
    "stop": (),
    "stop_token_ids": (),
    "ignore_eos": (False,),
    "truncate_prompt_tokens": (),
    "token_healing": (False,),
    "seed": (),  # vLLM gives each completion of a group the same one then
}
"""Values, besides `None`, under which each setting leaves the model's distribution as it is."""


_LENGTHS = {"max_new_tokens", "max_length", "max_tokens"}


def as_mapping(settings: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """An optional mapping of a config, which holds a string only until `TrainingArguments` has parsed it."""
    if isinstance(settings, str):
        raise ValueError(f"{settings!r} is not a mapping: write it as JSON, e.g. '{{\"key\": 1}}'.")
    return dict(settings or {})


def distribution_altering_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """
    Generation settings whose values make samples differ in distribution from the model's softmax.

    Args:
        settings (`Mapping[str, Any]`):
            Names and values as in [`~transformers.GenerationConfig`] or vLLM's sampling parameters.

    Returns:
        `dict[str, str]`: name of each offending setting and what to do about it, as text.
    """
    return {
        name: f"set it to {_EXACT_VALUES[name][0]}" if _EXACT_VALUES[name] else "leave it out"
        for name, value in settings.items()
        if name in _EXACT_VALUES and value is not None and value not in _EXACT_VALUES[name]
    }


class Inexact(NamedTuple):
    """A setting, or several of a kind, with which a trainer does not do what it promises."""

    refusal: str
    """One sentence: what is set, why it cannot be, and what to set instead."""
    fixed_point: str
    """One sentence: where training goes with it all the same."""
    changes_samples: bool = False
    """Whether completions are other than the model's: kept ones are then of no use to an exact run."""


_NOT_USED = "It is not used: the fixed point is the posterior, without it."


def inexact_settings(args: GRPOConfig, scale_rewards: Any) -> list[Inexact]:
    """
    All settings of a configuration under which the fixed point is not the posterior.

    Args:
        args ([`~trl.GRPOConfig`]): checked by TRL.
        scale_rewards: as the user gave it, which TRL may have given another name.
    """
    sampling = (inexact._replace(changes_samples=True) for inexact in _sampling(args))
    return [*sampling, *_objectives(args, scale_rewards)]


def _sampling(args: GRPOConfig) -> Iterator[Inexact]:
    """Those under which completions are not samples of the distribution that is scored."""
    sampling = {name: getattr(args, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}
    for source, settings in (("", sampling), (" in `generation_kwargs`", as_mapping(args.generation_kwargs))):
        if altering := distribution_altering_settings(settings):
            several = len(altering) > 1
            names = " and ".join(f"`{name}={settings[name]}`" for name in altering)
            advice = " and ".join(f"{advice} for `{name}`" if several else advice for name, advice in altering.items())
            yield Inexact(
                f"{names}{source} {'change' if several else 'changes'} the distribution that completions are sampled "
                f"from, but not the one that is scored, so the result would not be the posterior: {advice}.",
                f"With {names}{source} the policy is corrected only where it is sampled: what is cut off or penalized "
                "keeps a probability that nobody controls, and the weights of the rest are off by it.",
            )
    if lengths := as_mapping(args.generation_kwargs).keys() & _LENGTHS:
        name = min(lengths)
        yield Inexact(
            f"`{name}` in `generation_kwargs` cuts completions where `max_completion_length` does not say it: set "
            "`max_completion_length` instead.",
            f"With `{name}` in `generation_kwargs` the fixed point is a posterior of completions of that length, and "
            "samples of the prior that were kept are not of it.",
        )
    if args.vllm_structured_outputs_regex is not None:
        yield Inexact(
            "`vllm_structured_outputs_regex` hides completions that the posterior may contain: leave it unset and "
            "make the format a reward function of a `constraint` target.",
            "With `vllm_structured_outputs_regex` the policy is corrected only among completions that match.",
        )
    if args.mask_truncated_completions:
        yield Inexact(
            "`mask_truncated_completions=True` drops outcomes that the policy does produce, so the result would not "
            "be the posterior: set it to False, and give truncated completions a low reward if they are unwanted.",
            "With `mask_truncated_completions` the fixed point is the posterior among completions that end; how often "
            "the policy is cut at `max_completion_length` is left alone.",
        )
    if args.neftune_noise_alpha is not None:
        yield Inexact(
            f"`neftune_noise_alpha={args.neftune_noise_alpha}` adds noise to the embeddings while completions are "
            "scored, but not while they are sampled: leave it unset.",
            "With `neftune_noise_alpha` log-probabilities are noisy, and the policy is off by that noise.",
        )


def _objectives(args: GRPOConfig, scale_rewards: Any) -> Iterator[Inexact]:
    """Those that add to, or reshape, the objective, so that its optimum is not the posterior."""
    if args.scale_rewards != "none":
        yield Inexact(
            f"`scale_rewards={scale_rewards!r}` divides rewards by their standard deviation, so `beta` would not be "
            "the posterior's temperature: set `scale_rewards='none'`.",
            f"`scale_rewards={scale_rewards!r}`: {_NOT_USED}",
        )
    if args.multi_objective_aggregation != "sum_then_normalize":
        yield Inexact(
            f"`multi_objective_aggregation={args.multi_objective_aggregation!r}` rescales each reward by its batch, "
            "so the log-potential would depend on the batch: set 'sum_then_normalize' and use `reward_weights`.",
            f"`multi_objective_aggregation={args.multi_objective_aggregation!r}`: {_NOT_USED}",
        )
    if args.sync_ref_model:
        yield Inexact(
            "`sync_ref_model=True` moves the prior, and the posterior with it, during training: set it to False.",
            "With `sync_ref_model` the prior follows the policy, and the posterior goes on to ever larger rewards.",
        )
    if args.top_entropy_quantile < 1.0:
        yield Inexact(
            f"`top_entropy_quantile={args.top_entropy_quantile}` drops tokens from the gradient, so the result would "
            "not be the posterior: set it to 1.0.",
            f"`top_entropy_quantile={args.top_entropy_quantile}`: {_NOT_USED}",
        )
    if args.entropy_coef != 0.0 or args.use_adaptive_entropy:
        yield Inexact(
            "An entropy bonus moves the optimum away from the posterior, whose entropy the prior already sets: set "
            "`entropy_coef=0.0` and `use_adaptive_entropy=False` (a larger `beta` keeps more of the prior's entropy).",
            f"`entropy_coef` and `use_adaptive_entropy`: {_NOT_USED}",
        )
    if args.off_policy_mask_threshold is not None:
        yield Inexact(
            "`off_policy_mask_threshold` drops completions by their weight, so the result would not be the posterior: "
            "leave it unset (forward KL by importance weights and trajectory balance are safe off-policy).",
            f"`off_policy_mask_threshold`: {_NOT_USED}",
        )
