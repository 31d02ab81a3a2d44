"""What to say of keys and flags that no command knows: those that others renamed or removed, and misspelled ones."""

from collections.abc import Collection, Iterable

from ..spelling import did_you_mean


_RENAMED = {
    # transformers 5
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "torch_dtype": "dtype",
    "torchdynamo": "torch_compile_backend",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "include_inputs_for_metrics": "include_for_metrics",
    "tpu_metrics_debug": "debug",
    "evaluation_steps": "eval_steps",
    "overwrite_output_dir": "overwrite",
    # TRL
    "max_new_tokens": "max_completion_length",
    "response_length": "max_completion_length",
    "rloo_k": "num_generations",
    "kl_coef": "beta",
    "init_kl_coef": "beta",
    "reward_model_path": "reward_model_name_or_path",
    "sft_model_path": "prior_model_name_or_path",
    "ref_model_name_or_path": "prior_model_name_or_path",
    "ref_model": "prior_model_name_or_path",
    "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "vllm_max_model_len": "vllm_max_model_length",
    "vllm_guided_decoding_regex": "vllm_structured_outputs_regex",
    "wandb_log_unique_prompts": "log_unique_prompts",
    "local_batch_size": "per_device_train_batch_size",
    "num_ppo_epochs": "num_iterations",
    "ppo_epochs": "num_iterations",
    "reward_model": "reward_model_name_or_path",
    "sft_model": "prior_model_name_or_path",
    "ref_model_path": "prior_model_name_or_path",
    "rollout_batch_size": "generation_batch_size",
    # other libraries and habits
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "model_id": "model_name_or_path",
    "base_model": "model_name_or_path",
    "model_path": "model_name_or_path",
    "dataset": "dataset_name",
    "dataset_id": "dataset_name",
    "dataset_path": "dataset_name",
    "train_file": "dataset_name",
    "dataset_split": "dataset_train_split",
    "rewards": "reward_funcs",
    "reward_functions": "reward_funcs",
    "reward_function": "reward_funcs",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "n_epochs": "num_train_epochs",
    "max_epochs": "num_train_epochs",
    "train_epochs": "num_train_epochs",
    "num_train_epoch": "num_train_epochs",
    "steps": "max_steps",
    "num_steps": "max_steps",
    "total_steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "group_size": "num_generations",
    "n_samples": "num_generations",
    "num_return_sequences": "num_generations",
    "max_tokens": "max_completion_length",
    "exp_name": "run_name",
    "lora_rank": "lora_r",
    "use_lora": "use_peft",
}
"""Keys of others, and the field that means the same here."""

_REMOVED = {
    # transformers 5
    "warmup_ratio": "set `warmup_steps`, where a number below 1 is a share of all steps",
    "logging_dir": "it is where the environment variable TENSORBOARD_LOGGING_DIR says; set that under `env`",
    "group_by_length": "completions are generated in groups, one for each prompt: leave it out",
    "adafactor": "set `optim: adafactor`",
    "save_safetensors": "models are always saved as safetensors: leave it out",
    "use_mps_device": "a device that is there is used: leave it out",
    "half_precision_backend": "leave it out, and set `bf16` or `fp16`",
    "fp16_backend": "leave it out, and set `fp16`",
    "fp16_opt_level": "leave it out, and set `fp16`",
    "split_batches": "set it in `accelerator_config`",
    "dispatch_batches": "set it in `accelerator_config`",
    "push_to_hub_organization": "set `hub_model_id` to organization/name",
    "include_tokens_per_second": "leave it out",
    "jit_mode_eval": "leave it out",
    "past_index": "leave it out",
    "use_flash_attention_2": "set `attn_implementation: flash_attention_2`",
    "use_legacy_prediction_loop": "leave it out",
    "use_ipex": "leave it out",
    # TRL
    "max_prompt_length": "prompts are not cut: leave it out, and keep the beginning of long ones with `prompt_words`",
    "max_length": "prompts are not cut: set `max_completion_length`, and keep the beginning of long ones with "
    "`prompt_words`",
    "max_seq_length": "prompts are not cut: set `max_completion_length`, and keep the beginning of long ones with "
    "`prompt_words`",
    "mini_batch_size": "set `per_device_train_batch_size` and `gradient_accumulation_steps`",
    "cliprange": "nothing is clipped: leave it out",
    "clip_range": "nothing is clipped: leave it out",
    "target_kl": "`beta` sets how far the posterior is from the prior: leave it out",
    "whiten_rewards": "rewards are not scaled, since `beta` is the posterior's temperature: leave it out",
    "ref_model_init_kwargs": "the prior is loaded with `model_init_kwargs` too: set those",
    "vllm_device": "set `vllm_mode`, 'colocate' or 'server'",
    "vllm_dtype": "the weights are the policy's: leave it out",
    "gradient_checkpointing_use_reentrant": "set `gradient_checkpointing_kwargs: {use_reentrant: false}`",
    "normalize_rewards": "rewards are not scaled, since `beta` is the posterior's temperature: leave it out",
    "normalize_advantages": "rewards are not scaled, since `beta` is the posterior's temperature: leave it out",
    "reward_clip_range": "clip in the reward function itself",
    "missing_eos_penalty": "make it a reward function of its own, as a factor of a `product` target",
    "total_episodes": "set `max_steps` or `num_train_epochs`",
    "num_mini_batches": "set `gradient_accumulation_steps` and `steps_per_generation`",
    "dataset_num_proc": "prompts are not processed beforehand: leave it out",
}
"""Keys of others that nothing here means, and what to do instead."""


def unknown_keys(unknown: Collection[str], known: Iterable[str], source: str) -> str:
    """
    A sentence about keys of a recipe that nothing knows, with what to do about each.

    Args:
        unknown (`list[str]`): the keys, at least one.
        known (`list[str]`): those that there are.
        source (`str`): the recipe's file.
    """
    known = list(known)
    hints = {key: _hint(key, known, known) for key in unknown}
    if len(hints) == 1:
        ((key, hint),) = hints.items()
        return f"Unknown key `{key}` in {source}{hint}: see --help."
    return f"Unknown keys in {source}: {', '.join(f'`{key}`{hint}' for key, hint in hints.items())}: see --help."


def unknown_flags(unknown: Collection[str], known: Iterable[str]) -> str:
    """The same for what stands on a command line; `unknown` may hold values of unknown flags too."""
    known = list(known)
    fields = [flag.lstrip("-") for flag in known]
    words = [token.partition("=")[0] for token in unknown if token.startswith("-")] or list(unknown)[:1]
    hints = {word: _hint(word, known, fields) for word in words}
    if len(hints) == 1:
        ((word, hint),) = hints.items()
        return f"Unknown argument `{word}`{hint}: see --help."
    return f"Unknown arguments: {', '.join(f'`{word}`{hint}' for word, hint in hints.items())}: see --help."


def _hint(word: str, known: list[str], fields: list[str]) -> str:
    """What to do about an unknown key or flag, in brackets; only what this command has is suggested."""
    key = word.lstrip("-").replace("-", "_")
    if _RENAMED.get(key) in fields:
        return f" (here it is `{_RENAMED[key]}`)"
    named = _REMOVED.get(key, "").split("`")[1::2]
    if key in _REMOVED and (not named or any(name.partition(":")[0] in fields for name in named)):
        return f" ({_REMOVED[key]})"
    return did_you_mean(word, known)
