"""What is scored is what was sampled, for every architecture; and a check that stops a training where it is not.

Prompts of one, two and three tokens in one batch, so that padding matters. The learning rate is 0 unless a test is
about where training ends.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.helpers.architectures import ARCHITECTURES, build_model
from tests.helpers.trainers import QUIET, TRAINERS
from trl_bayes import KLRLConfig, KLRLTrainer
from trl_bayes.benchmarks.exact_training import default_arguments
from trl_bayes.benchmarks.tiny import letter_count_task
from trl_bayes.prior.identity import prompt_key
from trl_bayes.trainers import posterior_trainer


TASK = letter_count_task()
BETA = 0.7
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("architectures")
    return {name: build_model(root / name, name) for name in ARCHITECTURES}


@pytest.fixture
def make(folders: dict[str, str], tmp_path: Path) -> Make:
    def build(architecture: str, kind: str = "kl_rl", **settings: Any) -> Any:
        row = TRAINERS[kind]
        defaults = {
            **QUIET,
            "output_dir": str(tmp_path),
            "beta": BETA,
            "learning_rate": 0.0,
            "max_steps": 1,
            "num_generations": 4,
            "per_device_train_batch_size": 16,
            "max_completion_length": TASK.max_completion_length,
            "router_aux_loss_coef": 0.0,
        }
        if row.takes_target is False:
            del defaults["beta"]
        args = row.config(**{**defaults, **settings})
        return row.trainer(folders[architecture], TASK.reward_func, args, TASK.dataset(16))

    return build


def plain_log_probs(model: PreTrainedModel, batch: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    """`log pi(y)` of each completion, `(B,)`, by a forward pass of its own, without padding and in evaluation mode."""
    model.eval()
    values = []
    for row in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        log_probs = (logits / temperature).log_softmax(dim=1)
        values.append(log_probs.gather(1, completion[:, None]).sum())
    return torch.stack(values)


def keep_batches(trainer: Any) -> list[dict[str, Any]]:
    """The batches that the loss sees, with its terms."""
    seen: list[dict[str, Any]] = []
    compute_loss = trainer._compute_loss

    def compute_and_keep(model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = compute_loss(model, inputs)
        seen.append(dict(inputs))
        return loss

    trainer._compute_loss = compute_and_keep
    return seen


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}, {"temperature": 0.7}], ids=["", "reused", "cold"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_unpadded_prompts_without_noise(
    architecture: str, settings: dict[str, Any], folders: dict[str, str], make: Make
) -> None:
    trainer = make(architecture, **settings)
    batches = keep_batches(trainer)
    trainer.train()
    (batch,) = batches
    temperature = settings.get("temperature", 1.0)
    expected = plain_log_probs(AutoModelForCausalLM.from_pretrained(folders[architecture]), batch, temperature)
    log_prior = batch["log_target"] - rewards_of(trainer, batch) / BETA
    torch.testing.assert_close(batch["log_proposal"], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(log_prior, expected, rtol=0, atol=1e-4)
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["posterior/kl_prior"] == pytest.approx(0, abs=1e-5)
    assert log["kl"] == pytest.approx(0, abs=1e-5)


def rewards_of(trainer: Any, batch: dict[str, Any]) -> Tensor:
    texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    return torch.tensor(TASK.reward(texts))


def test_a_configuration_is_saved_as_it_was(make: Make, tmp_path: Path) -> None:
    """Dropout is off in training, not in the model's configuration."""
    trainer = make("falcon")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert (saved.config.attention_dropout, saved.config.hidden_dropout) == (0.1, 0.1)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_a_prior_of_its_own_is_scored_like_the_policy(architecture: str, folders: dict[str, str], make: Make) -> None:
    trainer = make(architecture, prior_model_name_or_path=folders[architecture])
    batches = keep_batches(trainer)
    trainer.train()
    expected = plain_log_probs(AutoModelForCausalLM.from_pretrained(folders[architecture]), batches[0])
    log_prior = batches[0]["log_target"] - rewards_of(trainer, batches[0]) / BETA
    torch.testing.assert_close(log_prior, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama_attention_dropout"])
def test_adapters_and_the_prior_beneath_them(architecture: str, folders: dict[str, str], tmp_path: Path) -> None:
    from peft import LoraConfig

    modules = ["c_attn"] if architecture == "gpt2" else ["q_proj", "v_proj"]
    args = KLRLConfig(
        **QUIET,
        output_dir=str(tmp_path),
        beta=BETA,
        learning_rate=0.0,
        max_steps=1,
        num_generations=4,
        per_device_train_batch_size=16,
        max_completion_length=TASK.max_completion_length,
    )
    lora = LoraConfig(r=2, lora_dropout=0.3, target_modules=modules, fan_in_fan_out=architecture == "gpt2")
    trainer = KLRLTrainer(folders[architecture], TASK.reward_func, args, TASK.dataset(16), peft_config=lora)
    batches = keep_batches(trainer)
    trainer.train()
    expected = plain_log_probs(AutoModelForCausalLM.from_pretrained(folders[architecture]), batches[0])
    torch.testing.assert_close(batches[0]["log_proposal"], expected, rtol=0, atol=1e-4)
    log_prior = batches[0]["log_target"] - rewards_of(trainer, batches[0]) / BETA
    torch.testing.assert_close(log_prior, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_samples_of_the_prior_that_are_kept(architecture: str, folders: dict[str, str], make: Make) -> None:
    import pyarrow.parquet as pq

    trainer = make(architecture, "dpg", partition="prior_samples", num_prior_samples=8)
    trainer.train()
    files = sorted((Path(trainer.args.output_dir) / "prior_samples").glob("**/*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist() if "log_prior" in row]
    model = AutoModelForCausalLM.from_pretrained(folders[architecture]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders[architecture])
    prompts = {prompt_key(ids): ids for ids in (tokenizer(text=prompt)["input_ids"] for prompt in TASK.prompts)}
    assert len(rows) == 8 * len(prompts)
    for row in rows:
        prompt = prompts[row["prompt_key"]]
        ids = torch.tensor([prompt + row["completion_ids"]])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(dim=1)
        expected = log_probs.gather(1, torch.tensor(row["completion_ids"])[:, None]).sum().item()
        assert row["log_prior"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("settings", [{}, {"replay_buffer_size": 0}], ids=["before", "by_the_update"])
@pytest.mark.parametrize("architecture", ["gpt2", "opt", "mixtral"])
def test_both_completions_of_a_pair(
    architecture: str, settings: dict[str, Any], folders: dict[str, str], make: Make
) -> None:
    """XPO's, of which one is a sample of the prior that was kept; at the prior the loss is that of a coin, log 2."""
    trainer = make(architecture, "xpo", num_prior_samples=4, **settings)
    batches = keep_batches(trainer)
    trainer.train()
    (batch,) = batches
    model = AutoModelForCausalLM.from_pretrained(folders[architecture])
    of_prior = {f"completion_{name}": batch[f"prior_completion_{name}"] for name in ("ids", "mask")}
    expected = torch.stack([plain_log_probs(model, batch), plain_log_probs(model, batch | of_prior)], dim=1)  # (M, 2)
    torch.testing.assert_close(batch["log_prior"], expected, rtol=0, atol=1e-4)
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert log["loss/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert log["logps/chosen"] + log["logps/rejected"] == pytest.approx(expected.sum(dim=1).mean().item(), abs=1e-4)


# --- the check before the first update -------------------------------------------------------------------------------


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes out the repairs of positions and noise."""
    monkeypatch.setattr(posterior_trainer, "make_exact", lambda *args, **kwargs: None)


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}], ids=["by_the_update", "before_it"])
@pytest.mark.parametrize(
    ("architecture", "cause"),
    [
        ("gpt2", "reads a padded prompt differently"),
        ("gpt_neo", "reads a padded prompt differently"),
        ("opt", "adds noise in training mode"),
        ("llama_attention_dropout", "adds noise in training mode"),
        ("mixtral", "adds noise in training mode"),
    ],
)
def test_the_check_refuses_what_the_repairs_mend(
    architecture: str, cause: str, settings: dict[str, Any], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    # TRL itself switches off the modules of GPT-2's dropout, so that only positions are wrong
    trainer = make(architecture, **settings)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=rf"policy's log-probabilities differ by .*{cause}.*check_log_probs=False"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_the_check_can_be_left_out(architecture: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    make(architecture, check_log_probs=False).train()


def test_the_check_refuses_noise_in_embeddings(make: Make) -> None:
    trainer = make("llama", inexact_settings="warn")
    trainer.args.neftune_noise_alpha = trainer.neftune_noise_alpha = 5.0  # the configuration refuses it
    with pytest.raises(ValueError, match="adds noise in training mode"):
        trainer.train()


def test_the_check_refuses_a_head_that_the_scorer_does_not_know(make: Make) -> None:
    trainer = make("llama")
    trainer.model.lm_head.register_forward_hook(lambda module, args, logits: logits.clamp(max=0.5))
    with pytest.raises(ValueError, match="transforms its logits"):
        trainer.train()


def test_the_check_refuses_a_prior_that_is_read_differently(
    make: Make, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = posterior_trainer.make_exact

    def without_the_prior(policy: Any, prior: Any, *args: Any, **kwargs: Any) -> None:
        whole(policy, None, *args, **kwargs)

    monkeypatch.setattr(posterior_trainer, "make_exact", without_the_prior)
    with pytest.raises(ValueError, match="prior's log-probabilities differ .* reads a padded prompt differently"):
        make("gpt2").train()


@pytest.mark.parametrize(("shift", "refused"), [(0.02, False), (0.3, True)])
def test_the_check_compares_what_the_sampler_reports(shift: float, refused: bool, make: Make) -> None:
    trainer = make("llama")
    generate = trainer._generate_single_turn

    def generate_and_report(*args: Any, **kwargs: Any) -> Any:
        completion_ids, _ = generate(*args, **kwargs)
        prompts = args[0]
        reported = []
        for prompt, ids in zip(prompts, completion_ids, strict=True):
            with torch.no_grad():
                logits = trainer.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            own = logits.log_softmax(dim=1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
            reported.append((own + shift).tolist())
        return completion_ids, reported

    trainer._generate_single_turn = generate_and_report
    if refused:
        with pytest.raises(ValueError, match="vLLM's log-probabilities differ .* `--logprobs-mode processed"):
            trainer.train()
    else:
        trainer.train()


def test_bfloat16_does_not_reach_the_tolerance(make: Make) -> None:
    make("llama", model_init_kwargs={"dtype": "bfloat16"}).train()
    make("gpt2", model_init_kwargs={"dtype": "bfloat16"}).train()


def test_the_check_costs_one_batch_only(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    check = posterior_trainer.refuse_inexact
    monkeypatch.setattr(posterior_trainer, "refuse_inexact", lambda *args: calls.append(check(*args)))
    make("llama", max_steps=3).train()
    assert len(calls) == 1


# --- where training ends ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kl_rl", "dpg"])
def test_ends_as_near_to_the_posterior_as_a_llama(kind: str, folders: dict[str, str], make: Make) -> None:
    arguments = {name: value for name, value in default_arguments(TASK).items() if name != "max_completion_length"}
    arguments["max_steps"] = 80  # 20,480 completions
    ends = {}
    for architecture in ("llama", "gpt2", "opt", "llama_attention_dropout"):
        trainer = make(architecture, kind, **arguments)
        trainer.train_dataset = TASK.dataset(1024)
        trainer.train()
        prior = AutoModelForCausalLM.from_pretrained(folders[architecture]).eval()
        tokenizer = AutoTokenizer.from_pretrained(folders[architecture])
        policy = trainer.model.eval()
        ends[architecture] = TASK.evaluate(policy, tokenizer, prior, lambda rewards: rewards / BETA).forward_kl
    print(kind, ends)
    assert all(end <= 1.2 * ends["llama"] for end in ends.values()), ends
