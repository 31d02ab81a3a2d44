"""Log-probabilities that are kept: found again for the same model, precision and temperature, and for no other."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trl_bayes.benchmarks.tiny import letter_count_task
from trl_bayes.language_models.completions import Completions
from trl_bayes.language_models.samples import sample
from trl_bayes.language_models.scoring import log_probs
from trl_bayes.language_models.settings import SamplingSettings
from trl_bayes.prior import log_probs as module
from trl_bayes.prior.log_probs import KeptLogProbs


TASK = letter_count_task()


@pytest.mark.parametrize(
    ("dtype", "temperature"), [(torch.float32, 1.0), (torch.float32, 0.5), (torch.float64, 1.0)], ids=str
)
def test_what_was_kept_is_of_the_same_distribution(
    dtype: torch.dtype, temperature: float, letters_prior: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(letters_prior)
    model = AutoModelForCausalLM.from_pretrained(letters_prior, dtype=torch.float32)
    settings = SamplingSettings(TASK.max_completion_length)
    drawn = sample(model, tokenizer, TASK.prompts, 8, settings)
    first = KeptLogProbs(tmp_path, model, letters_prior)(model, drawn, settings)
    assert torch.equal(first, log_probs(model, drawn, settings))

    scored = []

    def counted(model: PreTrainedModel, completions: Completions, settings: SamplingSettings) -> torch.Tensor:
        assert not settings.progress  # the bar is of all chunks
        scored.append(len(completions))
        return log_probs(model, completions, settings)

    monkeypatch.setattr(module, "log_probs", counted)
    other = AutoModelForCausalLM.from_pretrained(letters_prior, dtype=dtype)
    at = SamplingSettings(TASK.max_completion_length, temperature, progress=True)
    found = KeptLogProbs(tmp_path, other, letters_prior)(other, drawn, at)
    torch.testing.assert_close(found, log_probs(other, drawn, at), rtol=0, atol=1e-6)
    assert (sum(scored) > 0) == ((dtype, temperature) != (torch.float32, 1.0))


def test_they_are_of_one_model_only(letters_prior: str, tmp_path: Path) -> None:
    model, other = (AutoModelForCausalLM.from_pretrained(letters_prior) for _ in range(2))
    settings = SamplingSettings(TASK.max_completion_length)
    drawn = sample(model, AutoTokenizer.from_pretrained(letters_prior), TASK.prompts, 2, settings)
    with pytest.raises(ValueError, match="are kept for another model: make a `KeptLogProbs` for each"):
        KeptLogProbs(tmp_path, model, letters_prior)(other, drawn, settings)
