"""The page for those who come from TRL's XPOTrainer has every field of its last configuration, and what it is here."""

import dataclasses
import re
from pathlib import Path

import pytest

from trl_bayes import XPOConfig


PAGE = (Path(__file__).parents[2] / "docs" / "coming_from_xpo_trainer.md").read_text(encoding="utf-8")
# Of `trl.experimental.xpo.XPOConfig` of TRL 1.13.0 and the two classes that it inherits from, as its wheel has them
FIELDS_OF_TRL_1_13 = """
alpha learning_rate remove_unused_columns reward_model_path max_new_tokens max_length temperature top_p top_k min_p
repetition_penalty generation_kwargs cache_implementation missing_eos_penalty beta loss_type disable_dropout use_vllm
vllm_model_impl vllm_structured_outputs_regex vllm_gpu_memory_utilization vllm_mode vllm_server_base_url
vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_tensor_parallel_size vllm_enable_sleep_mode
ds3_gather_for_generation model_init_kwargs trust_remote_code reward_weights
logging_steps gradient_checkpointing bf16 lr_scheduler_kwargs use_liger_kernel torch_empty_cache_steps
""".split()
GONE = {"reward_model_path", "max_new_tokens", "max_length"}
HERE = {field.name: field for field in dataclasses.fields(XPOConfig)}


def table() -> dict[str, str]:
    """What each field of the table is here."""
    text = PAGE.split("## Every field of TRL 1.13's XPOConfig")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| `")]
    return {name: said for names, said in rows for name in re.findall(r"`(\w+)`", names)}


def test_all_fields_are_there_and_no_others() -> None:
    assert table().keys() == set(FIELDS_OF_TRL_1_13) and len(FIELDS_OF_TRL_1_13) == 39


@pytest.mark.parametrize("name", FIELDS_OF_TRL_1_13)
def test_what_is_gone_and_what_is_kept(name: str) -> None:
    said = table()[name]
    assert (name in HERE) is (name not in GONE)
    if default := re.search(r"the same, default `?([\w-]+(?:\.\d+)?)`?", said):
        assert HERE[name].default == type(HERE[name].default)(eval(default[1]))
    if mentioned := re.match(r"`(\w+)`, default (\d+)", said):
        assert HERE[mentioned[1]].default == int(mentioned[2])
