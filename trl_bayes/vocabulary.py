"""Whether two models read tokens in the same way, without which their probabilities cannot be compared."""

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase


def check_same_vocabulary(
    role: str,
    name: str,
    config: PretrainedConfig,
    prior_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    trust_remote_code: bool = False,
) -> None:
    """
    Refuses a model that reads tokens in another way than the prior.

    Its own tokenizer is compared where it comes with one; models of one family may pad their embeddings to different
    sizes. Otherwise the sizes must agree.

    Args:
        role (`str`): what the model is, for the message, such as `"proposal"`.
        name (`str`): its id or folder.
        config ([`~transformers.PretrainedConfig`]): its configuration.
        prior_config ([`~transformers.PretrainedConfig`]): the prior's.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the prior's.
        trust_remote_code (`bool`, *optional*, defaults to `False`): runs code that comes with the model.

    Raises:
        ValueError: one sentence.
    """
    advice = "use a model with the prior's tokenizer."
    try:
        vocabulary = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code).get_vocab()
    except (OSError, ValueError):  # no tokenizer beside the weights
        vocabulary = None
    if vocabulary is not None and vocabulary != tokenizer.get_vocab():
        raise ValueError(f"The tokenizer of the {role} has another vocabulary than the prior's: {advice}")
    size, prior_size = (c.get_text_config().vocab_size for c in (config, prior_config))
    if vocabulary is None and size != prior_size:
        raise ValueError(f"The {role} has a vocabulary of {size} tokens, the prior one of {prior_size}: {advice}")
