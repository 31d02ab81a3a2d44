"""Which generation settings keep the sampled distribution equal to the scored one."""

from collections.abc import Mapping
from typing import Any


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
}
"""Values, besides `None`, under which each setting leaves the model's distribution as it is."""


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
