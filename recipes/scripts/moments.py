# /// script
# requires-python = ">=3.11"
# dependencies = ["trl_bayes"]
# ///
"""
Distributional control: half of the biographies are about women, and nothing else changes.

`Moments` is the distribution nearest to the prior in which each feature has the mean that you ask for. Its weights
are fitted to samples of the prior before the first update.

    python recipes/scripts/moments.py --output_dir runs/half_women --max_completion_length 40 --num_generations 64 \\
        --num_prior_samples 4096

Every field of `DPGConfig` is a flag; `--help` lists them.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import HfArgumentParser

from trl_bayes import DPGConfig, DPGTrainer
from trl_bayes.rewards import more_of
from trl_bayes.targets import Moments


@dataclass
class ScriptArguments:
    """The model and the data: ids on the Hub, or folders."""

    model: str = field(
        default="mkhalifa/gpt2-biographies", metadata={"help": "Model that is trained; its start is the prior."}
    )
    dataset: str = field(default="recipes/gender_balance", metadata={"help": "Data set with a column `prompt`."})
    share: float = field(default=0.5, metadata={"help": "Share of texts about women."})


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, DPGConfig)).parse_args_into_dataclasses()
    female = more_of(["she", "her", "hers", "herself"], than=["he", "him", "his", "himself"], called="female")
    trainer = DPGTrainer(
        model=script.model,
        reward_funcs=female,
        target=Moments({"female": script.share}),
        args=args,
        train_dataset=load_dataset("json", data_files=f"{script.dataset}/*.jsonl", split="train"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
