# /// script
# requires-python = ">=3.11"
# dependencies = ["trl_bayes"]
# ///
"""
KL-RL: right answers to GSM8K, at a temperature that you choose.

The policy approaches `p ∝ prior * exp(r / beta)`: with `beta=0.1` a right answer becomes e^10 times as probable,
relative to a wrong one, as it is under the prior.

    python recipes/scripts/kl_rl.py --output_dir runs/kl_rl --max_steps 200 --bf16

Every field of `KLRLConfig` is a flag; `--help` lists them.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import HfArgumentParser

from trl_bayes import KLRLConfig, KLRLTrainer
from trl_bayes.rewards import gsm8k_accuracy


@dataclass
class ScriptArguments:
    """The model and the data: ids on the Hub, or folders."""

    model: str = field(
        default="Qwen/Qwen2.5-0.5B-Instruct", metadata={"help": "Model that is trained; its start is the prior."}
    )
    dataset: str = field(default="openai/gsm8k", metadata={"help": "Data set with columns `question` and `answer`."})
    config: str | None = field(default="main", metadata={"help": "Configuration of the data set."})


def as_prompt(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    question = row["question"] + "\nReason step by step, and put your final answer within \\boxed{}."
    return {"prompt": [{"role": "user", "content": question}]}


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, KLRLConfig)).parse_args_into_dataclasses()
    trainer = KLRLTrainer(
        model=script.model,
        reward_funcs=gsm8k_accuracy,  # reads the column `answer`
        args=args,
        train_dataset=load_dataset(script.dataset, script.config, split="train").map(as_prompt),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
