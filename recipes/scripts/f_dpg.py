# /// script
# requires-python = ">=3.11"
# dependencies = ["trl_bayes"]
# ///
"""
f-DPG: a condition and a preference at once, by Jensen-Shannon divergence.

A completion must be a finished sentence (else it has no probability), and short ones are preferred: e times as
probable for every `words_per_nat` words less.

    python recipes/scripts/f_dpg.py --output_dir runs/short_sentences --max_completion_length 40 --num_generations 32

Every field of `FDPGConfig` is a flag; `--help` lists them.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import HfArgumentParser

from trl_bayes import FDPGConfig, FDPGTrainer
from trl_bayes.rewards import length_in, matches
from trl_bayes.targets import Constraint, Product, Tilt


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
    words_per_nat: float = field(default=5.0, metadata={"help": "Words that cost a factor of e."})
    prompt_words: int = field(default=4, metadata={"help": "Words of each text that are its prompt."})


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, FDPGConfig)).parse_args_into_dataclasses()
    rows = load_dataset(script.dataset, split="train")
    prompts = rows.map(lambda row: {"prompt": " ".join(row["text"].split()[: script.prompt_words])})
    args.reward_weights = [1.0, -1.0]  # the more words, the less reward
    trainer = FDPGTrainer(
        model=script.model,
        reward_funcs=[matches(r"[.!?]\"?$", called="finished"), length_in("words", called="words")],
        target=Product([Constraint(rewards="finished"), Tilt(beta=script.words_per_nat, rewards="words")]),
        args=args,
        train_dataset=prompts.select_columns(["prompt"]),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
