"""Whether two models read tokens in the same way, without which their probabilities cannot be compared."""

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase


def check_same_vocabulary(
    role: str,
    name: str,
    config: PretrainedConfig,
    reference_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    trust_remote_code: bool = False,
    *,
    reference: str = "prior",
    advice: str = "use a model with the prior's tokenizer.",
) -> None:
    """
    Refuses a model that reads tokens in another way than a reference does, usually the prior.

    Its own tokenizer is compared where it comes with one; models of one family may pad their embeddings to different
    sizes. Otherwise the sizes must agree.

    Args:
        role (`str`): what the model is, for the message, such as `"proposal"`.
        name (`str`): its id or folder.
        config ([`~transformers.PretrainedConfig`]): its configuration.
        reference_config ([`~transformers.PretrainedConfig`]): the reference's.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the reference's.
        trust_remote_code (`bool`, *optional*, defaults to `False`): runs code that comes with the model.
        reference (`str`, *optional*, defaults to `"prior"`): what the reference is, for the message.
        advice (`str`, *optional*): what to do about it, for the message.

    Raises:
        ValueError: one sentence.
    """
    try:
        vocabulary = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code).get_vocab()
    except (OSError, ValueError):  # no tokenizer beside the weights
        vocabulary = None
    if vocabulary is not None and vocabulary != tokenizer.get_vocab():
        raise ValueError(f"The tokenizer of the {role} has another vocabulary than the {reference}'s: {advice}")
    size, reference_size = (c.get_text_config().vocab_size for c in (config, reference_config))
    if vocabulary is None and size != reference_size:
        raise ValueError(
            f"The {role} has a vocabulary of {size} tokens, the {reference} one of {reference_size}: {advice}"
        )
