"""What we rely on in TRL, one fact a test: after an upgrade of TRL, what fails here is what moved.

Everything is observed in TRL's own GRPOTrainer and GRPOConfig, never in ours. Each test says which of our files needs
the fact. Ours are tested in the files beside this one.
"""

import ast
import importlib
import inspect
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import (
    add_fused_lm_head,
    create_model_from_path,
    disable_dropout_in_model,
    get_config_model_id,
    pad,
    shuffle_sequence_dict,
    split_tensor_dict,
)

import trl_bayes
from tests.helpers.trainers import QUIET
from tests.helpers.training import length_reward, lora
from trl_bayes.trainers import batches, posterior_config, posterior_trainer


PACKAGE = Path(trl_bayes.__file__).parent
G = 2
BATCH = 2 * G
PROMPTS = ["The sky is", "Rain", "Explicit is better than", "Two plus two makes"]


class Watched(GRPOTrainer):
    """GRPOTrainer that keeps what the methods that we override are given and return."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.rewards: list[tuple[tuple, dict, torch.Tensor]] = []
        self.generated: list[tuple[list[dict], dict[str, Any]]] = []
        self.losses: list[tuple[tuple, dict]] = []
        self.shown: list[list[float]] = []  # TRL's advantages, at the end of each generation
        super().__init__(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        self.rewards.append((args, kwargs, rewards.clone()))
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [dict(row) for row in inputs]
        output = super()._generate_and_score_completions(inputs)
        self.generated.append((rows, dict(output)))
        self.shown.append(list(self._logs["advantages"]))
        return output

    def _compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.losses.append((args, kwargs))
        return super()._compute_loss(*args, **kwargs)


Make = Callable[..., Watched]


@pytest.fixture
def make(tiny_models: Any, tmp_path: Path) -> Make:
    def make_trainer(config: dict[str, Any] | None = None, cls: type = Watched, **arguments: Any) -> Watched:
        defaults = {
            "output_dir": str(tmp_path / "out"),
            **QUIET,
            "max_steps": 1,
            "per_device_train_batch_size": BATCH,
            "num_generations": G,
            "max_completion_length": 6,
            "beta": 0.1,
            "scale_rewards": "none",
        }
        arguments = {
            "model": tiny_models.policy,
            "reward_funcs": length_reward,
            "train_dataset": Dataset.from_dict({"prompt": PROMPTS}),
            **arguments,
        }
        return cls(args=GRPOConfig(**{**defaults, **(config or {})}), **arguments)

    return make_trainer


# --- Names and signatures --------------------------------------------------------------------------------------------


def trl_imports() -> list[tuple[str, str, str]]:
    """(our file, module, name) of everything that we import from TRL."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "trl":
                found += [(str(file.relative_to(PACKAGE)), str(node.module), alias.name) for alias in node.names]
            if isinstance(node, ast.Import):
                found += [
                    (str(file.relative_to(PACKAGE)), alias.name, "")
                    for alias in node.names
                    if alias.name.split(".")[0] == "trl"
                ]
    return found


@pytest.mark.parametrize(("file", "module", "name"), trl_imports(), ids="-".join)
def test_what_we_import_from_trl_is_there(file: str, module: str, name: str) -> None:
    assert not module.startswith("trl.experimental"), f"{file} uses what TRL may change without notice"
    imported = importlib.import_module(module)
    assert not name or hasattr(imported, name), f"{file} needs {module}.{name}: it is gone or has moved"


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("_calculate_rewards", ["inputs", "prompts", "completions", "completion_ids_list"]),
        ("_generate_and_score_completions", ["inputs"]),
        (
            "_generate_single_turn",
            ["prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
        ),
        ("_compute_loss", ["model", "inputs"]),
        ("_save_checkpoint", ["model", "trial"]),
        ("_load_optimizer_and_scheduler", ["checkpoint"]),
        ("_get_output_dir", ["trial"]),
    ],
)
def test_signatures_of_the_methods_that_we_override_or_call(method: str, parameters: list[str]) -> None:
    signature = inspect.signature(getattr(GRPOTrainer, method))
    assert list(signature.parameters) == ["self", *parameters]


def test_completions_are_generated_by_one_method_row_by_row(make: Make) -> None:
    # prior_share.py puts the prior's completions beside those that it has generated
    trainer = make()
    given = [[65, 66, 2], [67, 2], [68, 2], [69, 70, 71, 2]]
    trainer._generate_single_turn = lambda *args: (given, None)
    trainer.train()
    (_, output), *_ = trainer.generated
    pairs = zip(output["completion_ids"], output["completion_mask"].bool(), strict=True)
    assert [ids[mask].tolist() for ids, mask in pairs] == given


def test_signature_of_the_scorer() -> None:
    # batches.scorer_inputs passes by name, and hands on all inputs of a multimodal batch
    ours = {"input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy", "compute_aux_loss"}
    signature = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies)
    assert list(signature.parameters)[:2] == ["self", "model"]
    assert set(list(signature.parameters)[2:]) == ours | set(batches._MODEL_INPUTS)


def test_constructor_parameters_are_ours_but_for_the_target() -> None:
    theirs = inspect.signature(GRPOTrainer.__init__).parameters
    ours = dict(inspect.signature(posterior_trainer.PosteriorTrainer.__init__).parameters)
    target = ours.pop("target")
    assert target.kind is inspect.Parameter.KEYWORD_ONLY
    assert target.default is None
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind), name


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (pad, ["tensors", "padding_value", "padding_side"]),
        (add_fused_lm_head, ["model", "temperature", "cast_lm_head_to_fp32"]),
        (create_model_from_path, []),
        (disable_dropout_in_model, []),
        (disable_gradient_checkpointing, ["model", "gradient_checkpointing_kwargs"]),
        (get_config_model_id, ["config"]),
    ],
)
def test_utilities_take_what_we_pass(function: Callable, parameters: list[str]) -> None:
    assert set(parameters) <= set(inspect.signature(function).parameters)


# --- GRPOConfig ------------------------------------------------------------------------------------------------------

REFUSED = {  # setting: the default, which is the exact one
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "generation_kwargs": None,
    "vllm_structured_outputs_regex": None,
    "mask_truncated_completions": False,
    "multi_objective_aggregation": "sum_then_normalize",
    "sync_ref_model": False,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "off_policy_mask_threshold": None,
}
WITHOUT_EFFECT = {  # setting: TRL's default, at which we do not warn
    "loss_type": "dapo",
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "importance_sampling_level": "token",
    "use_bias_correction_kl": True,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_max": 3.0,
    "vllm_importance_sampling_clip_min": None,
}
OVERRIDDEN = {"beta": 0.0, "scale_rewards": "group", "disable_dropout": False}  # setting: TRL's default


@pytest.mark.parametrize(("name", "default"), {**REFUSED, **WITHOUT_EFFECT, **OVERRIDDEN}.items())
def test_defaults_that_we_assume(name: str, default: Any) -> None:
    fields = GRPOConfig.__dataclass_fields__
    assert name in fields, f"GRPOConfig has no `{name}` any more: posterior_config.py reads it"
    assert fields[name].default == default, f"TRL has changed the default of `{name}`"


def test_settings_without_effect_are_those_listed_here() -> None:
    assert set(posterior_config.NO_EFFECT) == set(WITHOUT_EFFECT)


def test_every_setting_of_grpo_is_judged() -> None:
    # A field that a new TRL adds may shape the objective or the sampling: it must be looked at, then added here.
    # Batches, generation backends, tools, logging, and parameters of what is refused or without effect: left to TRL
    left_to_trl = {
        "model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "cast_lm_head_to_fp32", "num_generations",
        "num_generations_eval", "max_completion_length", "ds3_gather_for_generation", "shuffle_dataset",
        "pad_to_multiple_of", "generation_batch_size", "steps_per_generation", "chat_template_kwargs",
        "cache_implementation", "use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode",
        "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
        "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size", "num_iterations",
        "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg",
        "vespo_lambda_neg", "reward_weights", "ref_model_mixup_alpha", "ref_model_sync_steps", "entropy_coef_min",
        "entropy_coef_max", "entropy_coef_delta", "entropy_target", "max_tool_calling_iterations",
        "vllm_importance_sampling_correction", "log_completions", "log_multimodal", "num_completions_to_print",
        "log_unique_prompts", "log_completions_hub_repo", "use_transformers_continuous_batching",
        "transformers_continuous_batching_config", "use_transformers_paged", "vllm_importance_sampling_cap",
        # of transformers.TrainingArguments, with another default
        "learning_rate", "remove_unused_columns",
    }  # fmt: skip
    own = set(GRPOConfig.__annotations__)
    judged = left_to_trl | set(REFUSED) | set(WITHOUT_EFFECT) | set(OVERRIDDEN)
    assert own - judged == set(), "new in TRL: do these move the fixed point?"
    assert judged - own == set(), "gone from TRL"


def test_booleans_of_scale_rewards_become_names(tmp_path: Path) -> None:
    # posterior_config compares with "none" after TRL's __post_init__
    for value, name in ((False, "none"), (True, "group")):
        assert GRPOConfig(str(tmp_path), use_cpu=True, scale_rewards=value).scale_rewards == name


def test_mappings_in_configs_are_declared(tmp_path: Path) -> None:
    # posterior_config adds `target` to this list, so that `--target '{...}'` is read as JSON
    assert "model_init_kwargs" in GRPOConfig._VALID_DICT_FIELDS
    config = GRPOConfig(str(tmp_path), use_cpu=True, generation_kwargs='{"top_k": 0}')
    assert config.generation_kwargs == {"top_k": 0}


def test_steps_per_generation_is_known_after_construction(tmp_path: Path) -> None:
    # off_policy_trainer sizes the replayed part of a batch by it
    config = GRPOConfig(str(tmp_path), use_cpu=True, gradient_accumulation_steps=4)
    assert config.steps_per_generation == 4
    assert config.generation_batch_size == 4 * config.per_device_train_batch_size


# --- What a generation returns ---------------------------------------------------------------------------------------

ALWAYS = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch"}


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        ({}, ["ref"]),
        ({"beta": 0.0}, []),
        ({"gradient_accumulation_steps": 2}, ["ref"]),
        ({"steps_per_generation": 2}, ["ref", "old"]),
        ({"num_iterations": 2}, ["ref", "old"]),
        ({"use_vllm": True}, ["ref", "old", "sampling"]),
        ({"use_vllm": True, "vllm_importance_sampling_correction": False}, ["ref", "sampling"]),
    ],
    ids=str,
)
def test_names_and_shapes_in_a_generated_batch(
    config: dict[str, Any], keys: list[str], make: Make, fake_vllm: type
) -> None:
    # batches.sequence_log_probs reads these and scores the policy itself where `old_per_token_logps` is
    # missing; replay_buffer cuts them into rows
    trainer = make(config)
    trainer.train()
    _, output = trainer.generated[0]
    by_token = {f"{name}_per_token_logps" for name in keys}
    assert set(output) - {"importance_sampling_ratio"} == ALWAYS | by_token
    rows, tokens = output["completion_ids"].shape
    assert rows == BATCH * trainer.args.steps_per_generation
    assert output["num_items_in_batch"].dim() == 0
    for name in set(output) - {"num_items_in_batch"}:
        assert isinstance(output[name], torch.Tensor)
        assert output[name].size(0) == rows, f"{name} is not by sequence"
    for name in by_token:
        assert output[name].shape == (rows, tokens)
    if "sampling" in keys:  # what vLLM could not score is NaN, not None or 0
        assert output["sampling_per_token_logps"].isnan().sum() == 1
    assert list(output)[0] == "prompt_ids"  # its length is the batch's, see the next test


def test_a_batch_is_shuffled_and_split_by_its_first_value() -> None:
    # So nothing may stand before `prompt_ids`, and every tensor that we add has the batch as its first dimension;
    # tensors without dimensions are kept whole
    batch = {"ids": torch.arange(8).view(4, 2), "scalar": torch.tensor(7), "flag": torch.arange(4), "none": None}
    shuffled = shuffle_sequence_dict(batch)
    assert torch.equal(shuffled["ids"][:, 0] // 2, shuffled["flag"])
    assert sorted(shuffled["flag"].tolist()) == [0, 1, 2, 3]
    parts = split_tensor_dict(batch, 2)
    assert [part["flag"].tolist() for part in parts] == [[0, 1], [2, 3]]
    assert all(part["scalar"] == 7 for part in parts)
    with pytest.raises(TypeError):
        shuffle_sequence_dict({"scalar": torch.tensor(7), "ids": torch.arange(4)})


def test_padding_of_a_batch(make: Make) -> None:
    # replay_buffer unpads by the masks and pads again on the same sides
    trainer = make({"num_generations": 4})
    trainer.train()
    output = trainer.generated[0][1]
    pad_token = trainer._tokenizer.pad_token_id
    for name, side in (("prompt", 1), ("completion", -1)):
        ids, mask = output[f"{name}_ids"], output[f"{name}_mask"]
        assert mask.dtype == torch.long
        assert ((mask.diff(dim=1) * side) >= 0).all(), f"{name}s are padded on the other side"
        assert (ids[mask == 0] == pad_token).all()
    padded = pad([torch.ones(1), torch.ones(3)], padding_value=5, padding_side="left")
    assert padded.tolist() == [[5, 5, 1], [1, 1, 1]]


def test_groups_are_contiguous(make: Make) -> None:
    # posterior_trainer views (B_global, ...) as (prompts, num_generations, ...)
    trainer = make({"steps_per_generation": 2})
    trainer.train()
    rows, output = trainer.generated[0]
    for prompts in zip(*[iter(row["prompt"] for row in rows)] * G, strict=True):
        assert len(set(prompts)) == 1
    assert (output["prompt_ids"].view(-1, G, output["prompt_ids"].size(1)).diff(dim=1) == 0).all()


def test_rewards_are_by_completion_and_function_and_nan_where_there_is_none(make: Make) -> None:
    def sometimes(completions: list, **kwargs: Any) -> list[float | None]:
        return [None if i == 1 else 2.0 for i in range(len(completions))]

    trainer = make(reward_funcs=[length_reward, sometimes])
    trainer.train()
    (args, kwargs, rewards), (_, output) = trainer.rewards[0], trainer.generated[0]
    assert len(args) == 4
    assert not kwargs
    assert rewards.dtype == torch.float32
    assert rewards.shape == (BATCH, 2)
    assert torch.equal(rewards[:, 0] * 4, output["completion_mask"].sum(dim=1))  # same order as the batch
    assert rewards[:, 1].isnan().tolist() == [i == 1 for i in range(BATCH)]
    assert trainer.reward_func_names == ["length_reward", "sometimes"]
    assert torch.equal(trainer.reward_weights, torch.ones(2))


def test_our_rewards_reach_the_metrics(make: Make) -> None:
    # We return infinite rewards as NaN from _calculate_rewards: TRL must read its return value, not its own tensor
    class Masked(Watched):
        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super()._calculate_rewards(*args, **kwargs) * torch.nan

    trainer = make(cls=Masked)
    trainer.train()
    assert trainer.state.log_history[0]["reward"] is None
    assert (trainer.generated[0][1]["advantages"] == 0).all()


def test_log_of_completions_ends_with_the_batch(make: Make) -> None:
    # posterior_trainer replaces TRL's advantages there by ours
    trainer = make({"max_steps": 2})
    trainer.train()
    advantages = trainer._logs["advantages"]
    assert isinstance(advantages, deque)
    assert advantages.maxlen == trainer.args.generation_batch_size == BATCH
    for (_, output), shown in zip(trainer.generated, trainer.shown, strict=True):
        assert shown == output["advantages"].tolist()


def test_log_of_completions_is_bounded_in_evaluation_too(make: Make) -> None:
    # An evaluation batch may be larger than the log, which then holds the end of it only
    trainer = make({"per_device_eval_batch_size": 2 * BATCH}, eval_dataset=Dataset.from_dict({"prompt": PROMPTS}))
    trainer.evaluate()
    assert len(trainer.generated[0][1]["advantages"]) == 2 * BATCH
    assert len(trainer._logs["advantages"]) == BATCH


def test_evaluation_has_its_own_group_size_and_is_told_by_the_model(make: Make) -> None:
    evaluation = Dataset.from_dict({"prompt": PROMPTS})
    trainer = make({"num_generations_eval": 1, "per_device_eval_batch_size": BATCH}, eval_dataset=evaluation)
    modes = []
    calculate = trainer._calculate_rewards

    def calculate_and_note(*args: Any) -> torch.Tensor:
        modes.append(trainer.model.training)
        return calculate(*args)

    trainer._calculate_rewards = calculate_and_note
    trainer.evaluate()  # before any training: `current_gradient_accumulation_steps` does not exist yet
    trainer.train()
    assert modes == [False, True]
    assert (trainer.num_generations, trainer.num_generations_eval) == (G, 1)
    assert [row["prompt"] for row in trainer.generated[0][0]] != [PROMPTS[0]] * BATCH
    assert len({row["prompt"] for row in trainer.generated[0][0]}) == BATCH  # one completion each


def test_tool_results_are_masked(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # batches.own_tokens: 1 for what the policy produced and in the padding, 0 for what came from outside
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        ids = [[65, 66, 67, 2][-(2 + i % 3) :] for i in range(len(prompts))]
        masks = [[0] + [1] * (len(row) - 1) for row in ids]
        prompt_ids = trainer._tokenizer(prompts)["input_ids"]
        return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": None, "env_mask": masks}

    trainer = make(rollout_func=rollout)
    trainer.train()
    output = trainer.generated[0][1]
    assert (output["tool_mask"][:, 0] == 0).all()
    assert (output["tool_mask"][:, 1:] == 1).all()
    assert (output["completion_mask"] == 0).any()


# --- Scoring ---------------------------------------------------------------------------------------------------------


def test_scorer_returns_log_probs_entropies_and_auxiliary_loss(make: Make, tiny_models: Any) -> None:
    trainer = make({"temperature": 0.7}, model=tiny_models.moe)
    ids = torch.randint(70, 200, (3, 7))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    score = trainer._get_per_token_logps_and_entropies
    with torch.no_grad():
        logps, entropies, aux_loss = score(trainer.model, ids, mask, 4, batch_size=2)
        assert entropies is None
        assert aux_loss is None
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, 2:-1] / 0.7
        _, entropies, aux_loss = score(trainer.model, ids, mask, 4, compute_entropy=True, compute_aux_loss=True)
    expected = logits.log_softmax(dim=2)
    torch.testing.assert_close(logps, expected.gather(2, ids[:, 3:].unsqueeze(2)).squeeze(2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, -(expected.exp() * expected).sum(dim=2), rtol=1e-4, atol=1e-4)
    assert aux_loss.dim() == 0
    assert trainer.aux_loss_enabled
    assert trainer.router_aux_loss_coef == 0.1


@pytest.mark.parametrize("config", [{"bf16": True}, {"model_init_kwargs": {"dtype": "bfloat16"}}], ids=str)
def test_log_probs_are_in_float32_whatever_the_model(config: dict[str, Any], make: Make) -> None:
    # posterior_trainer sums them over a completion without casting
    trainer = make(config)
    trainer.train()
    assert trainer.generated[0][1]["ref_per_token_logps"].dtype == torch.float32


def test_masked_positions_have_finite_log_probs(make: Make) -> None:
    # We multiply by the mask instead of filling
    trainer = make({"pad_to_multiple_of": 16})
    trainer.train()
    assert trainer.generated[0][1]["ref_per_token_logps"].isfinite().all()


# --- The reference model ---------------------------------------------------------------------------------------------


def test_where_the_reference_comes_from(make: Make, tiny_models: Any) -> None:
    # posterior_trainer: with a prior of its own, `args.beta` is 0 while TRL is set up, so that TRL makes no reference
    assert make().ref_model is not None
    assert make({"beta": 0.0}).ref_model is None
    adapted = make(peft_config=lora())
    assert adapted.ref_model is None  # the adapter is switched off instead
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_models.policy), lora())
    assert "ref" in make(model=trained).model.peft_config  # a copy of the adapter
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_models.policy), lora())
    assert "ref" not in make({"beta": 0.0}, model=trained).model.peft_config


def test_a_reference_that_is_set_later_is_used(make: Make, tiny_models: Any) -> None:
    # `beta` and `ref_model` are read when completions are scored, and `ref_model` goes before adapters
    trainer = make({"beta": 0.0}, peft_config=lora())
    assert trainer.beta == 0.0
    trainer.beta = 0.1
    prior = create_model_from_path(tiny_models.prior)
    add_fused_lm_head(prior, temperature=1.0, cast_lm_head_to_fp32=False)
    trainer.ref_model = trainer.accelerator.prepare_model(prior, evaluation_mode=True)
    trainer.train()
    output = trainer.generated[0][1]
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    start = output["prompt_ids"].size(1)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tiny_models.prior)(input_ids=ids, attention_mask=mask).logits
    expected = logits[:, start - 1 : -1].log_softmax(dim=2).gather(2, output["completion_ids"].unsqueeze(2)).squeeze(2)
    mask = output["completion_mask"].bool()
    torch.testing.assert_close(output["ref_per_token_logps"][mask], expected[mask], rtol=1e-4, atol=1e-4)


def test_a_models_own_generation_config_fills_the_gaps(make: Make) -> None:
    # Which is why posterior_trainer refuses models whose generation_config alters the distribution
    trainer = make()
    only = 100
    trainer.model.generation_config.suppress_tokens = [i for i in range(trainer.model.vocab_size) if i != only]
    trainer.train()
    output = trainer.generated[0][1]
    assert set(output["completion_ids"][output["completion_mask"].bool()].tolist()) == {only}
    assert "suppress_tokens" not in trainer.generation_kwargs
    given = {name for name, value in trainer.generation_kwargs.items() if value is not None}
    assert {"temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "do_sample"} <= given


# --- The loss --------------------------------------------------------------------------------------------------------


def test_loss_is_computed_from_model_and_batch_alone(make: Make) -> None:
    trainer = make({"gradient_accumulation_steps": 2})
    trainer.train()
    assert [(len(args), kwargs) for args, kwargs in trainer.losses] == [(2, {}), (2, {})]
    for args, _ in trainer.losses:
        assert args[1]["completion_ids"].size(0) == BATCH


def test_loss_is_scaled_for_accumulation_by_the_trainer_itself(make: Make) -> None:
    # posterior_trainer._compute_loss divides by `current_gradient_accumulation_steps`, and nobody does so again
    assert GRPOTrainer.loss_is_scaled_for_ga is True

    class Constant(Watched):
        def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
            assert self.current_gradient_accumulation_steps == 2
            return next(model.parameters()).sum()

    config = {"gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    trainer = make(config, cls=Constant)
    weight = next(trainer.model.parameters())
    before = weight.detach().clone()
    trainer.train()
    torch.testing.assert_close(before - weight, torch.full_like(weight, 2.0))


def test_metrics_are_lists_by_mode_and_unknown_values_are_left_out(make: Make) -> None:
    # posterior_trainer appends floats, NaN where a quantity does not exist
    trainer = make()
    assert set(trainer._metrics) == {"train", "eval"}
    trainer._metrics["eval"]["known"].append(1.0)
    trainer._metrics["train"]["known"] += [1.0, math.nan, 3.0]
    trainer._metrics["train"]["unknown"].append(math.nan)
    trainer.model.train()
    trainer.log({"loss": 0.0})
    assert trainer.state.log_history[-1]["known"] == 2.0
    assert trainer.state.log_history[-1]["unknown"] is None
    assert not trainer._metrics["train"]
    trainer.model.eval()
    trainer.log({})
    assert trainer.state.log_history[-1]["eval_known"] == 1.0


def test_completions_are_generated_once_and_reused(make: Make) -> None:
    # off_policy_trainer: `num_iterations` passes over a batch, and `steps_per_generation` parts of it
    trainer = make({"num_iterations": 2, "steps_per_generation": 2, "max_steps": 4})
    trainer.train()
    assert len(trainer.generated) == 1
    first, second, again, _ = (args[1]["completion_ids"] for args, _ in trainer.losses)
    assert torch.equal(first, again)
    assert torch.equal(torch.cat([first, second]).sort(dim=0)[0], trainer.generated[0][1]["completion_ids"].sort(0)[0])


# --- Checkpoints -----------------------------------------------------------------------------------------------------


def test_where_and_when_checkpoints_are_written_and_read(make: Make, tmp_path: Path) -> None:
    # posterior_trainer writes a file of its own into the folder first, and reads it with the optimizer
    calls: list[tuple[str, Any]] = []

    class Saving(Watched):
        def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            calls.append(("save", (str(folder), trial)))
            folder.mkdir(parents=True)
            (folder / "ours").touch()
            super()._save_checkpoint(model, trial)
            assert (folder / "ours").exists()
            assert (folder / "trainer_state.json").exists()

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            calls.append(("load", checkpoint))
            super()._load_optimizer_and_scheduler(checkpoint)

    config = {"save_strategy": "steps", "save_steps": 1}
    make(config, cls=Saving).train()
    folder = str(tmp_path / "out" / "checkpoint-1")
    assert calls == [("save", (folder, None))]
    calls.clear()
    make({**config, "max_steps": 2}, cls=Saving).train(resume_from_checkpoint=folder)
    assert calls == [("load", folder), ("save", (str(tmp_path / "out" / "checkpoint-2"), None))]


def test_model_card_is_made_from_class_attributes(make: Make, tmp_path: Path) -> None:
    class Named(Watched):
        _name = "Test Name"
        _tag_names = ["a-tag"]
        _paper = {"title": "A Title", "id": "1234.56789", "citation": "@article{nobody}"}

    trainer = make({"save_strategy": "steps", "save_steps": 1}, cls=Named)
    trainer.train()
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("Test Name", "a-tag", "A Title", "1234.56789", "@article{nobody}"):
        assert text in card


# --- Elsewhere -------------------------------------------------------------------------------------------------------


def test_attributes_that_we_read(make: Make, tiny_models: Any) -> None:
    trainer = make()
    for name in (
        "_is_vlm", "_tokenizer", "is_deepspeed_enabled", "is_fsdp_enabled", "use_vllm", "generation_kwargs",
        "aux_loss_enabled", "router_aux_loss_coef", "num_iterations", "temperature",
    ):  # fmt: skip
        assert hasattr(trainer, name), f"GRPOTrainer has no `{name}` any more"
    assert trainer.args.distributed_state.distributed_type == "NO"
    assert get_config_model_id(trainer.model.config) == tiny_models.policy
    assert trainer.accelerator.process_index == 0


def test_rows_of_the_dataset_reach_the_trainer_whole(make: Make) -> None:
    # batches.row_hashes identifies a prompt by its row; equal rows must hash alike, whatever their history
    dataset = Dataset.from_dict({"prompt": PROMPTS, "answer": [{"value": i, "text": str(i)} for i in range(4)]})
    trainer = make({"max_steps": 4}, train_dataset=dataset)
    trainer.train()
    hashes: dict[str, set[str]] = {}
    for rows, _ in trainer.generated:
        for row in rows:
            assert row["answer"] == {"value": PROMPTS.index(row["prompt"]), "text": str(PROMPTS.index(row["prompt"]))}
            hashes.setdefault(row["prompt"], set()).add(Hasher.hash(row))
    assert len(hashes) == 4
    assert all(len(of_a_prompt) == 1 for of_a_prompt in hashes.values())
