"""Build the embedded prior: a small language model of Python statements, half of them with a backslash behind.

Three stages, each deterministic given `--seed`, and each with a progress bar:

 - `corpus`: the interpreter's own standard library -> `corpus/train.txt` and `corpus/validation.txt`;
 - `train`: corpus -> tokenizer and model (needs torch, transformers with accelerate, and tokenizers; not TRL);
 - `evaluate`: tokenizer, model and corpus -> `metrics.json` and `prompts.jsonl`.

    python recipes/embedded_prior/build_prior.py --output_dir trl_bayes/assets/python_lines

Without the package installed, put the repository's root on `PYTHONPATH`.
"""

import ast
import json
import math
import os
import platform
import random
import sys
import sysconfig
import time
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


# cuBLAS reads this when it starts, and is deterministic only with it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from trl_bayes.rewards import parses


EOS = "<eos>"
IGNORED = -100  # the label that the loss leaves out

# What the prior is used with: the empty prompt, and starts of lines that end where a token ends.
PROMPTS = ("", "self.", "import ", "x = ", "return ")

SIMPLE_STATEMENTS = (
    ast.Expr,
    ast.Assign,
    ast.AugAssign,
    ast.AnnAssign,
    ast.Return,
    ast.Raise,
    ast.Delete,
    ast.Assert,
    ast.Import,
    ast.ImportFrom,
    ast.Global,
    ast.Nonlocal,
    ast.Pass,
    ast.Break,
    ast.Continue,
)

# A space belongs to the token before it, and not, as usual, to the one after it. So a prompt like "x = " is cut just
# as the lines that begin with it were in training, and the model continues what it knows.
# A backslash is always a token of its own.
PIECES = r"\\|\w+ ?|[^\w\s\\]+ ?|\s+"


@dataclass
class BuildPriorArguments:
    """Arguments of the recipe; the defaults build the prior that the package ships."""

    output_dir: str = field(metadata={"help": "Folder for the tokenizer, the model and metrics.json."})
    corpus_dir: str | None = field(default=None, metadata={"help": "Folder of the corpus; else output_dir/corpus."})
    stage: Literal["all", "corpus", "train", "evaluate"] = field(default="all", metadata={"help": "What to do."})
    seed: int = field(default=0, metadata={"help": "Seed of the split, the weights, the order and the samples."})

    min_characters: int = field(default=4, metadata={"help": "Shortest line in the corpus."})
    max_characters: int = field(default=60, metadata={"help": "Longest line in the corpus."})
    include_tests: bool = field(default=True, metadata={"help": "Take lines from the standard library's tests too."})
    validation_fraction: float = field(default=0.02, metadata={"help": "Share of the lines that is held out."})

    vocab_size: int = field(default=1024, metadata={"help": "Tokens, with the 256 bytes and <eos>."})
    hidden_size: int = field(default=192, metadata={"help": "Width of the model."})
    intermediate_size: int = field(default=512, metadata={"help": "Width of its feed-forward layers."})
    num_layers: int = field(default=3, metadata={"help": "Number of layers."})
    num_heads: int = field(default=6, metadata={"help": "Attention heads a layer."})

    num_train_epochs: float = field(default=12.0, metadata={"help": "Passes over the training lines."})
    max_tokens: int = field(default=10, metadata={"help": "Longest line that is read, in tokens of the model."})
    continued_share: float = field(
        default=0.5, metadata={"help": "Share of the lines that end in a backslash, as if the statement went on."}
    )
    max_steps: int = field(default=-1, metadata={"help": "Stop after so many steps instead, if positive."})
    batch_size: int = field(default=128, metadata={"help": "Lines a step."})
    learning_rate: float = field(
        default=2e-3, metadata={"help": "Peak learning rate, between a warm-up and a cosine."}
    )
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of AdamW."})

    num_samples: int = field(default=2000, metadata={"help": "Samples for each prompt in the evaluation."})
    max_new_tokens: int = field(default=12, metadata={"help": "Longest sample in tokens."})

    @property
    def output_path(self) -> Path:
        return Path(self.output_dir)

    @property
    def corpus_path(self) -> Path:
        return Path(self.corpus_dir) if self.corpus_dir else self.output_path / "corpus"


def standard_library_files(include_tests: bool) -> list[Path]:
    """List the standard library's own Python files, in an order that does not depend on the file system."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages"}
    if not include_tests:
        skipped |= {"test", "tests", "idle_test"}
    return sorted(
        path
        for path in root.rglob("*.py")
        # _sysconfigdata describes the machine on which the interpreter was built.
        if skipped.isdisjoint(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    )


def statement_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file that are one simple statement, and nothing besides: no comment, no `if` before it.

    Taking the statements from the file's own syntax tree leaves out what happens to parse alone: prose in docstrings,
    and the rows of long calls and tables. Statements that are only a string are left out: they are mostly prose too.
    """
    try:
        with tokenize.open(path) as file:  # heeds the encoding that the file declares
            text = file.read()
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # the tests keep files that are broken on purpose
    lines = text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, SIMPLE_STATEMENTS) or node.lineno != node.end_lineno:
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant | ast.JoinedStr):
            continue
        line = lines[node.lineno - 1]
        if line.isascii() and line.strip() == line[node.col_offset : node.end_col_offset]:
            yield line.strip()


def build_corpus(args: BuildPriorArguments) -> dict[str, int]:
    """Write the unique statement lines of the standard library, split into training and validation lines."""
    files = standard_library_files(args.include_tests)
    found: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the files' own, for example invalid escapes
        for path in tqdm(files, desc="Reading the standard library", unit="file"):
            found.update(statement_lines(path))
    candidates = sorted(line for line in found if args.min_characters <= len(line) <= args.max_characters)
    # `parses` has the last word, since it is the evidence that the prior is used with.
    kept = parses([""] * len(candidates), candidates)
    lines = [line for line, reward in zip(candidates, kept, strict=True) if reward]
    random.Random(args.seed).shuffle(lines)
    num_validation = round(len(lines) * args.validation_fraction)
    splits = {"validation": sorted(lines[:num_validation]), "train": sorted(lines[num_validation:])}
    args.corpus_path.mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        (args.corpus_path / f"{name}.txt").write_text("".join(f"{line}\n" for line in split), encoding="utf-8")
    return {name: len(split) for name, split in splits.items()}


def read_corpus(args: BuildPriorArguments, split: str) -> list[str]:
    return (args.corpus_path / f"{split}.txt").read_text(encoding="utf-8").splitlines()


def train_tokenizer(lines: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that puts <eos> in front of every text, so that the empty prompt is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A", pair=f"{EOS} $A $B", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def encode_lines(tokenizer: PreTrainedTokenizerBase, lines: Sequence[str]) -> list[list[int]]:
    """Encode every line as <eos> line <eos>."""
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(lines))["input_ids"]]


def short_lines(tokenizer: PreTrainedTokenizerBase, lines: Sequence[str], max_tokens: int) -> list[str]:
    """Lines of at most so many tokens, without <eos>."""
    encoded = encode_lines(tokenizer, lines)
    return [line for line, ids in zip(lines, encoded, strict=True) if len(ids) <= max_tokens + 2]


def collate(sequences: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad sequences on the right; the labels leave out the padding, but not the last <eos>, the same token."""
    length = max(map(len, sequences))
    input_ids = torch.full((len(sequences), length), pad_id)
    labels = torch.full((len(sequences), length), IGNORED)
    attention_mask = torch.zeros((len(sequences), length), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = labels[row, : len(sequence)] = torch.tensor(sequence)
        attention_mask[row, : len(sequence)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def training_order(lines: list[list[int]], backslash: int, args: BuildPriorArguments) -> list[list[int]]:
    """
    What the model reads, batch after batch: all lines in each epoch, some with a backslash behind, anew every time.

    Lines of one batch have similar lengths, since what pads them costs as much as they do.
    """
    rng = random.Random(args.seed)
    size = args.batch_size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(lines) / size)
    rows: list[list[int]] = []
    while len(rows) < steps * size:
        epoch = [[*line[:-1], backslash, line[-1]] if rng.random() < args.continued_share else line for line in lines]
        rng.shuffle(epoch)
        rows += epoch
    del rows[steps * size :]
    batches: list[list[list[int]]] = []
    for start in range(0, len(rows), 32 * size):
        window = sorted(rows[start : start + 32 * size], key=len)
        similar = [window[i : i + size] for i in range(0, len(window), size)]
        batches += rng.sample(similar, len(similar))
    return [row for batch in batches for row in batch]


def make_model(args: BuildPriorArguments, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        num_key_value_heads=args.num_heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # The fused kernels' backward passes are not deterministic on GPUs; lines are so short that "eager" is as fast.
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def train_model(
    args: BuildPriorArguments,
    tokenizer: PreTrainedTokenizerBase,
    train_lines: Sequence[str],
    validation_lines: Sequence[str],
) -> tuple[LlamaForCausalLM, list[dict[str, float]]]:
    """Train the model; return it with the Trainer's log (validation loss after every fifth)."""
    set_seed(args.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    model = make_model(args, tokenizer)
    backslash = tokenizer.convert_tokens_to_ids("\\")
    rows = training_order(encode_lines(tokenizer, train_lines), backslash, args)
    pad_id = tokenizer.pad_token_id
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            adam_beta2=0.95,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(0.05 * len(rows) / args.batch_size),
            eval_strategy="steps",
            eval_steps=0.2,
            logging_steps=0.2,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
        ),
        train_dataset=rows,
        eval_dataset=encode_lines(tokenizer, validation_lines),
        data_collator=lambda sequences: collate(sequences, pad_id),
    )
    trainer.train()
    return model, trainer.state.log_history


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, args: BuildPriorArguments) -> None:
    """Save weights in float16, half the size, under a configuration that says float32.

    So `from_pretrained` computes in float32 unless told otherwise, with the rounded weights; so does the evaluation.
    """
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=args.max_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.half().save_pretrained(args.output_path)
    tokenizer.save_pretrained(args.output_path)
    edits = {
        "config.json": {"dtype": "float32", "use_cache": True},  # the Trainer had switched the cache off
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},  # transformers 4 knows it
    }
    for name, changes in edits.items():
        path = args.output_path / name
        config = json.loads(path.read_text(encoding="utf-8")) | changes
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.inference_mode()
def validation_loss(model: Any, sequences: list[list[int]], pad_id: int, batch_size: int = 256) -> dict[str, float]:
    """Mean negative log-likelihood of the held-out lines in nats, their <eos> included, per token and per line."""
    total, num_tokens = 0.0, 0
    for start in tqdm(range(0, len(sequences), batch_size), desc="Validation loss", unit="batch"):
        batch = {
            name: tensor.to(model.device)
            for name, tensor in collate(sequences[start : start + batch_size], pad_id).items()
        }
        labels = batch.pop("labels")[:, 1:]  # (B, T - 1)
        logits = model(**batch).logits[:, :-1]  # (B, T - 1, V)
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
        num_tokens += int((labels != IGNORED).sum())
    return {"per_token": total / num_tokens, "per_line": total / len(sequences)}


@torch.inference_mode()
def sample(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, args: BuildPriorArguments
) -> tuple[list[str], float]:
    """Sample completed lines at temperature 1; return them and the share that ended by itself."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    prompt_length = inputs["input_ids"].shape[1]
    lines: list[str] = []
    num_terminated = 0
    while len(lines) < args.num_samples:
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=args.max_new_tokens,
            num_return_sequences=min(500, args.num_samples - len(lines)),
        )
        completions = output[:, prompt_length:]
        num_terminated += int((completions == tokenizer.eos_token_id).any(dim=1).sum())
        lines.extend(prompt + text for text in tokenizer.batch_decode(completions, skip_special_tokens=True))
    return lines, num_terminated / len(lines)


def evaluate(args: BuildPriorArguments) -> dict[str, Any]:
    """Measure the saved model as a user gets it: loss on the held-out lines, and what its samples are like."""
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.output_path)
    model = AutoModelForCausalLM.from_pretrained(args.output_path, dtype=torch.float32).eval()
    if torch.cuda.is_available():
        model.cuda()
    train_lines, validation_lines = read_corpus(args, "train"), read_corpus(args, "validation")
    short_train, short_validation = (
        short_lines(tokenizer, lines, args.max_tokens) for lines in (train_lines, validation_lines)
    )
    corpus = set(train_lines) | set(validation_lines)
    samples: dict[str, dict[str, Any]] = {}
    for prompt in tqdm(PROMPTS, desc="Sampling", unit="prompt"):
        lines, terminated = sample(model, tokenizer, prompt, args)
        rewards = parses([prompt] * len(lines), [line.removeprefix(prompt) for line in lines])
        samples[prompt] = {
            "parse": sum(reward or 0.0 for reward in rewards) / len(lines),
            "terminated": terminated,
            "distinct": len(set(lines)) / len(lines),
            "in_corpus": sum(line in corpus for line in lines) / len(lines),
            "examples": lines[:10],
        }
    return {
        "lines": {"train": len(train_lines), "validation": len(validation_lines)},
        "short_lines": {"train": len(short_train), "validation": len(short_validation)},
        "parameters": model.num_parameters(),
        "megabytes": round(sum(path.stat().st_size for path in args.output_path.glob("*.safetensors")) / 1e6, 2),
        "validation_loss": validation_loss(model, encode_lines(tokenizer, short_validation), tokenizer.pad_token_id),
        "num_samples": args.num_samples,
        "samples": samples,
    }


def read_metrics(args: BuildPriorArguments) -> dict[str, Any]:
    path = args.output_path / "metrics.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_metrics(args: BuildPriorArguments, metrics: dict[str, Any]) -> None:
    text = json.dumps(read_metrics(args) | metrics, indent=2)
    (args.output_path / "metrics.json").write_text(text + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stages that the command line asks for."""
    parser = HfArgumentParser(BuildPriorArguments, description=(__doc__ or "").partition("\n")[0])  # type: ignore[arg-type]
    (args,) = parser.parse_args_into_dataclasses(args=None if argv is None else list(argv))
    args.output_path.mkdir(parents=True, exist_ok=True)

    if args.stage in ("all", "corpus"):
        counts = build_corpus(args)
        print(f"Corpus: {counts['train']} training and {counts['validation']} validation lines in {args.corpus_path}")

    if args.stage in ("all", "train"):
        start = time.perf_counter()
        splits = [read_corpus(args, split) for split in ("train", "validation")]
        tokenizer = train_tokenizer(splits[0], args.vocab_size)
        model, log = train_model(
            args, tokenizer, *(short_lines(tokenizer, lines, args.max_tokens) for lines in splits)
        )
        save_model(model, tokenizer, args)
        cpu = f"CPU, {torch.get_num_threads()} threads"
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
        training = {
            "seconds": round(time.perf_counter() - start, 1),
            "device": device,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "validation_loss_by_fifths": [round(entry["eval_loss"], 4) for entry in log if "eval_loss" in entry],
        }
        write_metrics(args, {"training": training})
        print(f"Training: {training['seconds']} s on {device}")

    if args.stage in ("all", "evaluate"):
        start = time.perf_counter()
        metrics = evaluate(args)
        metrics["evaluation_seconds"] = round(time.perf_counter() - start, 1)
        write_metrics(args, metrics)
        prompts = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
        (args.output_path / "prompts.jsonl").write_text(prompts, encoding="utf-8")
        print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
