"""A reward model as a reward function: what TRL's trainers make of an id or folder, for whoever has no trainer."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from trl import apply_chat_template, is_conversational

from .calling import reward_name


class RewardModel:
    """
    The first output of a sequence classifier for prompt and completion.

    As in training, a conversation is written by the reward model's own chat template, a prompt that is a text is
    joined with its completion, and no special tokens are added.

    Args:
        name (`str`): id or folder.
        model_init_kwargs (`dict`, *optional*): for `from_pretrained`, those of the policy, as TRL has it.
        chat_template_kwargs (`dict`, *optional*): for the chat template.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where it runs.
        batch_size (`int`, *optional*, defaults to `64`): texts in a forward pass.
    """

    def __init__(
        self,
        name: str,
        model_init_kwargs: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        batch_size: int = 64,
    ):
        settings = dict(model_init_kwargs or {})
        model: Any = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, **settings)
        self.model = (model.to(device) if settings.get("device_map") is None else model).eval()
        of_tokenizer = {key: settings[key] for key in ("revision", "trust_remote_code") if key in settings}
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            self.model.config._name_or_path, **of_tokenizer
        )
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id  # finds the last token by it
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.batch_size = batch_size
        self.__name__ = reward_name(name)

    def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(
                text=texts[start : start + self.batch_size],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=False,
            )
            with torch.inference_mode():
                scores += self.model(**batch.to(self.model.device)).logits[:, 0].float().tolist()
        return scores

    def _text(self, prompt: Any, completion: Any) -> str:
        if not is_conversational({"prompt": prompt}):
            return prompt + completion
        messages = {"messages": prompt + completion}
        return apply_chat_template(messages, self.tokenizer, **self.chat_template_kwargs)["text"]
