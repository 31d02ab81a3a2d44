"""The recipe of the embedded prior, end to end on a tiny corpus: what it builds, and that it builds the same again."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bayes.rewards import parses


RECIPE = Path(__file__).parents[2] / "recipes" / "embedded_prior" / "build_prior.py"

SOURCE = '''"""A module whose docstring has
x = 1
that is no statement."""
import os
from sys import path  # with a comment
def f(a, b):
    """Say something."""
    if a: return 1
    self.value = a + b
    call(
        first,
        second,
    )
    x = 1; y = 2
    "only a string"
    return self.value
été = 1
y = 'a very long line, much longer than sixty characters would ever be'
a
class C: z = 3
self.value = a + b
'''


def load_recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_prior", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_prior"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe():
    yield load_recipe()
    del sys.modules["build_prior"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    lines = [f"{a}.{b}({c})" for a in ("self", "os", "x", "re") for b in ("get", "add", "pop") for c in range(8)]
    lines += [f"{a} = {b}" for a in ("x", "y", "self.z", "name") for b in range(20)]
    lines += [f"import {a}{b}" for a in ("os", "re") for b in range(12)]
    (folder / "train.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (folder / "validation.txt").write_text("x = 99\nreturn self.x\nimport json\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def build(recipe, corpus):
    """Build a tiny prior into a folder."""

    def run(output_dir: Path, *extra: str) -> Path:
        tiny = "--vocab_size 300 --hidden_size 32 --intermediate_size 64 --num_layers 1 --num_heads 2 --batch_size 16"
        steps = "--max_steps 5 --num_samples 8 --max_new_tokens 6"
        common = ["--output_dir", str(output_dir), "--corpus_dir", str(corpus), *tiny.split(), *steps.split(), *extra]
        deterministic = torch.are_deterministic_algorithms_enabled()
        try:
            for stage in ("train", "evaluate"):
                recipe.main(["--stage", stage, *common])
        finally:
            torch.use_deterministic_algorithms(deterministic)
        return output_dir

    return run


@pytest.fixture(scope="module")
def built(build, tmp_path_factory):
    return build(tmp_path_factory.mktemp("prior"))


def test_only_whole_simple_statements_are_lines(recipe, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(SOURCE, encoding="utf-8")
    expected = {"import os", "self.value = a + b", "return self.value", "a"}
    expected.add("y = 'a very long line, much longer than sixty characters would ever be'")
    assert set(recipe.statement_lines(path)) == expected


@pytest.mark.parametrize("content", [b"x = (", b"x = '\xff'", b"x = 1\0"])
def test_files_that_are_no_python_have_no_lines(recipe, tmp_path, content):
    path = tmp_path / "broken.py"
    path.write_bytes(content)
    assert list(recipe.statement_lines(path)) == []


def test_corpus_is_split_unique_and_repeatable(recipe, tmp_path, monkeypatch):
    files = []
    for name in ("a", "b"):
        files.append(tmp_path / f"{name}.py")
        files[-1].write_text(SOURCE + "".join(f"{name}{i} = {i}\n" for i in range(50)), encoding="utf-8")
    monkeypatch.setattr(recipe, "standard_library_files", lambda include_tests: files)
    texts = []
    for folder in ("one", "two"):
        recipe.main(["--stage", "corpus", "--output_dir", str(tmp_path / folder), "--validation_fraction", "0.1"])
        texts.append({p.name: p.read_text(encoding="utf-8") for p in (tmp_path / folder / "corpus").iterdir()})
    assert texts[0] == texts[1]
    train, validation = (texts[0][f"{split}.txt"].splitlines() for split in ("train", "validation"))
    assert len(validation) == 10 and len(train) == 93
    assert len(set(train) | set(validation)) == 103
    assert all(4 <= len(line) <= 60 for line in train + validation)


def test_standard_library_files_are_its_own(recipe):
    files = recipe.standard_library_files(include_tests=False)
    names = {path.name for path in files}
    assert {"argparse.py", "textwrap.py"} <= names
    assert not any("site-packages" in path.parts or path.name.startswith("_sysconfigdata") for path in files)
    assert files == sorted(files)


def test_tokenizer_marks_the_start_and_keeps_the_text(built):
    tokenizer = AutoTokenizer.from_pretrained(built)
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<eos>"
    assert tokenizer("")["input_ids"] == [tokenizer.eos_token_id]
    for text in ("x = 99", "  two  spaces , and\ttab", "return  'été'"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("prompt", ["x = ", "self.", "import ", "return "])
def test_a_prompt_is_cut_as_in_the_lines_that_begin_with_it(built, prompt):
    tokenizer = AutoTokenizer.from_pretrained(built)
    start = tokenizer(prompt)["input_ids"]
    for rest in ("x", "value", "json as j"):
        assert tokenizer(prompt + rest)["input_ids"][: len(start)] == start


def test_the_labels_keep_the_last_eos_and_drop_the_padding(recipe):
    batch = recipe.collate([[0, 5, 0], [0, 5, 6, 7, 0]], pad_id=0)
    assert batch["labels"].tolist() == [[0, 5, 0, -100, -100], [0, 5, 6, 7, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["input_ids"].tolist() == [[0, 5, 0, 0, 0], [0, 5, 6, 7, 0]]


def test_a_backslash_is_a_token_of_its_own(built):
    """So that putting its token behind those of a statement is the same as encoding the line with it."""
    tokenizer = AutoTokenizer.from_pretrained(built)
    whole, continued = (tokenizer(line)["input_ids"] for line in ("import json, os", "import json, os\\"))
    assert continued == [*whole, tokenizer.convert_tokens_to_ids("\\")]
    assert parses(["", ""], ["import json, os", "import json, os\\"]) == [1.0, 0.0]


def test_every_epoch_reads_every_line_once(recipe):
    lines = [[0, *([number] * (2 + number % 7)), 0] for number in range(1, 129)]
    args = recipe.BuildPriorArguments(output_dir="", batch_size=2, num_train_epochs=2, continued_share=0.5)
    order = recipe.training_order(lines, 999, args)
    assert len(order) == 256
    for epoch in (order[:128], order[128:]):
        assert sorted(row[1] for row in epoch) == list(range(1, 129))
    assert order[:128] != order[128:]
    for row in order:
        whole = lines[row[1] - 1]
        assert row in (whole, [*whole[:-1], 999, 0])
    share = sum(999 in row for row in order) / 256
    assert abs(share - 0.5) < 0.14  # 4.5 standard errors
    batches = [order[start : start + 2] for start in range(0, 256, 2)]
    padded = sum(2 * max(map(len, batch)) for batch in batches)
    assert padded < 1.2 * sum(map(len, order))
    assert [len(batch[0]) for batch in batches] != sorted(len(batch[0]) for batch in batches)
    args.continued_share, args.max_steps = 0.0, 5
    short = recipe.training_order(lines, 999, args)
    assert len(short) == 10 and all(row == lines[row[1] - 1] for row in short)


def test_model_is_small_on_disk_and_float32_in_memory(built):
    model = AutoModelForCausalLM.from_pretrained(built)
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings and model.config.use_cache
    stored = (built / "model.safetensors").stat().st_size
    assert stored < 2.2 * model.num_parameters() + 8192  # two bytes each, and the header
    for parameter in model.parameters():
        assert torch.equal(parameter, parameter.half().float())


def test_metrics_say_what_was_built(built):
    metrics = json.loads((built / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["lines"] == {"train": 200, "validation": 3}
    assert len(metrics["training"]["validation_loss_by_fifths"]) == 5
    assert 0 < metrics["validation_loss"]["per_token"] < metrics["validation_loss"]["per_line"]
    prompt_lines = (built / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in prompt_lines]
    assert list(metrics["samples"]) == prompts == ["", "self.", "import ", "x = ", "return "]
    for prompt, entry in metrics["samples"].items():
        assert all(line.startswith(prompt) for line in entry["examples"])
        assert all(0 <= entry[share] <= 1 for share in ("parse", "terminated", "distinct", "in_corpus"))
    # The model that was trained, before it was rounded to float16, had the same loss.
    trained = metrics["training"]["validation_loss_by_fifths"][-1]
    assert metrics["validation_loss"]["per_token"] == pytest.approx(trained, abs=2e-3)


def test_the_same_seed_builds_the_same_files(built, build, tmp_path):
    again = build(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors", "prompts.jsonl"):
        assert (again / name).read_bytes() == (built / name).read_bytes(), name
    first, second = (json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in (built, again))
    assert first["samples"] == second["samples"]


def test_another_seed_builds_another_model(built, build, tmp_path):
    other = build(tmp_path / "other", "--seed", "1")
    assert (other / "tokenizer.json").read_bytes() == (built / "tokenizer.json").read_bytes()
    assert (other / "model.safetensors").read_bytes() != (built / "model.safetensors").read_bytes()


def test_help_lists_the_arguments(recipe, capsys):
    with pytest.raises(SystemExit) as exit_info:
        recipe.main(["--help"])
    assert exit_info.value.code == 0
    assert "--max_steps" in capsys.readouterr().out
