# /// script
# requires-python = ">=3.11"
# dependencies = ["trl_bayes"]
# ///
"""
DPG with a constraint: the prior, given that a word occurs.

Nothing is maximized. The policy approaches the prior's own texts in which the word occurs, in the same proportions.

    python recipes/scripts/dpg_constraint.py --output_dir runs/amazing --max_completion_length 40 --num_generations 64

Every field of `DPGConfig` is a flag; `--help` lists them.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import HfArgumentParser

from trl_bayes import DPGConfig, DPGTrainer
from trl_bayes.rewards import contains_word
from trl_bayes.targets import Constraint


@dataclass
class ScriptArguments:
    """The model and the data: ids on the Hub, or folders."""

    model: str = field(
        default="openai-community/gpt2", metadata={"help": "Model that is trained; its start is the prior."}
    )
    dataset: str = field(
        default="stanfordnlp/imdb",
        metadata={"help": "Data set with a column `text`, whose first words are the prompts."},
    )
    word: str = field(default="amazing", metadata={"help": "Word that must occur."})
    prompt_words: int = field(default=4, metadata={"help": "Words of each text that are its prompt."})


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, DPGConfig)).parse_args_into_dataclasses()
    rows = load_dataset(script.dataset, split="train")
    prompts = rows.map(lambda row: {"prompt": " ".join(row["text"].split()[: script.prompt_words])})
    trainer = DPGTrainer(
        model=script.model,
        reward_funcs=contains_word(script.word),
        target=Constraint(),  # 0 or 1: a condition, not something to maximize
        args=args,
        train_dataset=prompts.select_columns(["prompt"]),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
