"""Several language models as one, whose logits are a weighted sum of theirs at every token."""

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class MixedModel(nn.Module):
    """
    The model `softmax(sum_k c_k z_k)` at every token, `z_k` the logits of model k: a product of powers by token.

    It is called and generates as any causal language model here, so it can be sampled, scored and checked like one.
    Each model keeps its own cache. Tokens that are not in every vocabulary, which are padding of the embeddings, have
    probability 0.

    Args:
        models (`list[PreTrainedModel]`): that read the same tokens, on one device.
        coefficients (`list[float]`): `c_k`.
    """

    def __init__(self, models: Sequence[PreTrainedModel], coefficients: Sequence[float]):
        super().__init__()
        self.models, self.coefficients = nn.ModuleList(models), tuple(coefficients)
        self.generation_config = models[0].generation_config
        self._sizes = [model.config.get_text_config().vocab_size for model in models]
        self.config = models[self._sizes.index(min(self._sizes))].config  # whose tokens all models have
        self._take_positions = ["position_ids" in inspect.signature(type(m).forward).parameters for m in models]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutput:
        """The mixed logits `(B, L, V)` of whole rows."""
        logits = [model(input_ids=input_ids, attention_mask=attention_mask).logits for model in self.models]
        shortest = min(part.size(1) for part in logits)  # behind an adapter's virtual tokens
        return CausalLMOutput(logits=self._mix([part[:, part.size(1) - shortest :] for part in logits]))

    def _mix(self, logits: Sequence[Tensor]) -> Tensor:
        common, largest = min(self._sizes), max(self._sizes)
        mixed = sum(c * part[..., :common].float() for c, part in zip(self.coefficients, logits, strict=True))
        return nn.functional.pad(torch.as_tensor(mixed), (0, largest - common), value=-torch.inf)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, generation_config: GenerationConfig) -> Any:
        """
        Continues rows that are padded on the left; of the configuration, what `language_models` sets is read.

        Args:
            input_ids, attention_mask (`torch.Tensor`): (B, L).
            generation_config ([`~transformers.GenerationConfig`]): length, temperature, stop tokens and padding.

        Returns:
            `torch.Tensor`: (B, L + new); an object with `sequences` and `logits` if `return_dict_in_generate`.
        """
        config: Any = generation_config
        ids, mask, caches = input_ids, attention_mask, [None] * len(self.models)
        stops = torch.tensor(config.eos_token_id or [], dtype=ids.dtype, device=ids.device)
        finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        all_logits = []
        for _ in range(config.max_new_tokens):
            logits = self._mix([self._next(k, ids, mask, caches) for k in range(len(self.models))])  # (B, V)
            all_logits.append(logits)
            if config.do_sample:
                token = torch.multinomial((logits / config.temperature).softmax(dim=1), 1)
            else:
                token = logits.argmax(dim=1, keepdim=True)
            token = token.masked_fill(finished.unsqueeze(1), config.pad_token_id)
            ids, mask = torch.cat([ids, token], dim=1), torch.cat([mask, torch.ones_like(token)], dim=1)
            finished |= torch.isin(token.squeeze(1), stops)
            if finished.all():
                break
        if config.return_dict_in_generate:
            return SimpleNamespace(sequences=ids, logits=tuple(all_logits))
        return ids

    def _next(self, k: int, ids: Tensor, mask: Tensor, caches: list[Any]) -> Tensor:
        """Logits `(B, V)` of the next token by model k, which reads what its cache has not seen."""
        new = ids if caches[k] is None else ids[:, -1:]
        inputs: dict[str, Any] = {"input_ids": new, "attention_mask": mask, "use_cache": True}
        if self._take_positions[k]:
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -new.size(1) :]
        if caches[k] is not None:
            inputs["past_key_values"] = caches[k]
        output = self.models[k](**inputs)
        caches[k] = getattr(output, "past_key_values", None)  # a recurrent model has another: it reads all again
        return output.logits[:, -1]
