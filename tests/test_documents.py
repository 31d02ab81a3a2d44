"""What the Markdown files say is true: modules, commands, flags and links are there, and code blocks run."""

import functools
import importlib
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from trl_bayes import cli
from trl_bayes.command_line.demonstration_recipe import split_section_flags
from trl_bayes.commands import bench


ROOT = Path(__file__).parents[1]
# The examples of CONTRIBUTING add files, and `test_contributing.py` runs them
DOCUMENTS = [
    file
    for file in sorted(ROOT.rglob("*.md"))
    if file.name != "CONTRIBUTING.md" and not {".venv", "runs", "build"} & set(file.relative_to(ROOT).parts)
]
# Those whose blocks are run; recipes have tests of their own
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted(ROOT.glob("recipes/notebooks/*.ipynb"))
BLOCK = re.compile(r"(?:<!-- needs: ([\w ]+) -->\n)?^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Figures and pages that the site makes while it is built, of what lies elsewhere
FIGURES = set(re.findall(r'"(images/[\w.]+)": "recipes/', (ROOT / "docs/hooks/site.py").read_text(encoding="utf-8")))
GENERATED = {"changelog.md", *(f"notebooks/{notebook.stem}.md" for notebook in NOTEBOOKS)}


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def blocks(page: Path, language: str) -> Iterator[tuple[str, str]]:
    """What a block needs that is not here, and its text."""
    for needs, written_in, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if written_in == language:
            yield needs, text


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if any(blocks(page, language))]


# ---------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_what_is_imported_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for module, names in re.findall(r"^from (trl_bayes[\w.]*) import (\([^)]*\)|.*)", text, re.MULTILINE):
        for name in re.findall(r"\w+", re.sub(r" as \w+|#.*", "", names)):
            where = importlib.import_module(module)
            assert getattr(where, name, None) is not None or importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_and_sections_are_there(document: Path) -> None:
    """Where a line or a piece of code begins with `trl-bayes`."""
    text = document.read_text(encoding="utf-8")
    sections = {*bench.sections(), "task-sizes"}  # the last is an example
    for command, words in re.findall(r"(?:`|^ *)trl-bayes ([a-z][a-z_-]*)((?: [a-z][a-z_-]*)*)", text, re.MULTILINE):
        assert command in cli.commands(), f"trl-bayes {command}"
        if command == "bench":
            assert set(words.split()) <= sections, f"trl-bayes bench{words}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        file, _, anchor = target.partition("#")
        if file.startswith("https://") or file in GENERATED or file in FIGURES:
            continue
        found = page.parent / file if file else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings}


def test_no_merge_is_half_done() -> None:
    """A page with both sides of a conflict in it reads as if it were meant."""
    pages = [path for path in ROOT.rglob("*.md") if not {".venv", "build", "runs"} & set(path.relative_to(ROOT).parts)]
    assert pages
    marked = [
        path
        for path in pages
        if any(line.startswith(("<<<<<<<", ">>>>>>>")) for line in path.read_text().splitlines())
    ]
    assert not marked


def test_the_site_loads_nothing_from_elsewhere() -> None:
    """What its pages load is in the site. `offline` keeps to a script of this name; without one it loads its own."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert "offline" in site["plugins"] and site["theme"]["font"] is False
    loaded = [*site["extra"]["polyfills"], *site["extra_css"]]
    assert any("iframe-worker" in name for name in loaded)
    assert all((ROOT / "docs" / name).is_file() for name in loaded), loaded


def test_the_first_page_is_short_and_the_site_has_every_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180
    site = (ROOT / "mkdocs.yml").read_text()
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]} | GENERATED
    listed = set(re.findall(r"\S+\.md", site.partition("\nnav:")[2]))
    assert pages <= listed
    for page in PAGES[1:]:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        assert re.findall(r"^# ", prose, re.MULTILINE) == ["# "] and prose.startswith("# "), name_of(page)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@functools.cache
def flags_of(command: str) -> frozenset[str]:
    """The flags that a command's help names."""
    words: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", type("Kept", (), {"write": words.append, "flush": print, "isatty": bool}))
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])
    return frozenset(re.findall(r"--[\w-]+", "".join(words)))


@pytest.mark.parametrize("page", with_blocks("bash"), ids=name_of)
def test_command_lines_are_understood(page: Path) -> None:
    make = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for _, block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            match words:
                case []:
                    continue
                case ["make", target, *_]:
                    assert target in make, line
                case ["python", "-m", "venv", *_]:
                    continue
                case ["pip", "install", *_]:
                    assert set(re.findall(r"\.\[(\w+)\]", line)) <= extras.keys()
                case ["accelerate", "launch", "--config_file", file, "-m", module, *rest]:
                    assert (ROOT / file).is_file() and importlib.import_module(module), line
                    flags_are_known(module.rpartition(".")[2].replace("_", "-"), rest)
                case ["trl-bayes", command, *rest]:
                    flags_are_known(command, rest)
                case _:
                    raise AssertionError(f"what is to be checked about this line? {line}")


def flags_are_known(command: str, words: list[str]) -> None:
    if command == "bench":
        return  # its sections have flags of their own
    if command == "demo-rl":  # `--rl.max_steps` sets a field of a section
        words, of_sections = split_section_flags(words)
        assert {f"--{key}" for section, key, _ in of_sections if section == "rl"} <= flags_of("kl-rl")
    flags = {word for word in words if word.startswith("--")}
    assert flags <= flags_of(command), f"trl-bayes {command} {' '.join(words)}"
    for recipe in (value for flag, value in zip(words, words[1:], strict=False) if flag == "--config"):
        assert (ROOT / recipe).is_file() or recipe == "recipe.yaml", recipe


# ---------------------------------------------------------------------------------------------------------------------
# Code

# A block that needs the Hub: its model and its data are replaced, and what it leaves open is made small
STAND_INS = {"max_steps": 1, "per_device_train_batch_size": 16, "max_completion_length": 4, "num_prior_samples": 16}
STAND_INS |= {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}


def with_stand_ins(text: str, policy: str, reward_model: str) -> str:
    text = text.replace("Qwen/Qwen2.5-0.5B-Instruct", policy)
    for name in ("OpenAssistant/reward-model-deberta-v3-large-v2", "trl-lib/Qwen2-0.5B-Reward"):
        text = text.replace(name, reward_model)
    open_settings = {name: value for name, value in STAND_INS.items() if f"{name}=" not in text}
    return text.replace('output_dir="out"', f'output_dir="out", **{open_settings}')


@pytest.mark.parametrize("page", with_blocks("python"), ids=name_of)
def test_python_blocks_run(
    page: Path, tmp_path: Path, tiny_models: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other, as one script; in an empty folder."""
    monkeypatch.chdir(tmp_path)
    # A reward of TRL's that needs a package which is not installed gives way to one that is random
    monkeypatch.setattr("trl.rewards.accuracy_reward", even_length)
    rows = datasets.Dataset.from_dict({"prompt": ["The man", "in the moon"] * 4, "solution": ["1"] * 8})
    names: dict[str, Any] = {"__name__": "__main__", "dataset": rows}
    for needs, text in blocks(page, "python"):
        assert needs in ("", "hub", "a script")
        if needs == "a script":  # a part of one, with dots for the rest
            compile(text, name_of(page), "exec")
            continue
        code = with_stand_ins(text, tiny_models.policy, tiny_models.reward) if needs else text
        exec(compile(code, name_of(page), "exec"), names)
        if "trainer.train()" in text:
            assert names.pop("trainer").state.global_step > 0


def even_length(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(str(completion)) % 2 == 0) for completion in completions]


@pytest.mark.parametrize("page", [*with_blocks("yaml"), *with_blocks("json")], ids=name_of)
def test_data_blocks_can_be_read(page: Path) -> None:
    for _, text in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(text), dict)
    for _, text in blocks(page, "json"):
        assert all(json.loads(line) for line in text.splitlines())


def test_first_steps_from_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An own reward on an own data file, as the page says: its files, and then its commands, with less training."""
    page = ROOT / "docs" / "first_steps.md"
    text = page.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for file, content in re.findall(r"^`([\w.]+)`\n\n```\w+\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        (tmp_path / file).write_text(content)
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "my_rewards.py", "recipe.yaml"}
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    lines = [line for _, block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    shorter = {"dpg": ["--max_steps", "5"], "evaluate": ["--no_diversity"]}  # what is slow
    for words in (shlex.split(line) for line in lines if "runs/short" in line or "my_rewards" in line):
        cli.main([*words[1:], *shorter.get(words[1], [])])
    assert (tmp_path / "runs/report/report.html").is_file()
    assert (tmp_path / "runs/short/README.md").is_file() and (tmp_path / "runs/evaluation/evaluation.json").is_file()
    assert (tmp_path / "runs/posterior/train.parquet").is_file()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_notebooks_run(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On small settings; the outputs of a whole run are kept in it."""
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert sum(bool(cell["outputs"]) for cell in cells) >= 5
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    small = {"STEPS = 30": "STEPS = 1", "SAMPLES = 400": "SAMPLES = 40", "=320": "=40", "=64": "=8", "plt.show()": ""}
    script = "\n".join("".join(cell["source"]) for cell in cells)
    for whole, part in small.items():
        script = script.replace(whole, part)
    exec(compile(script, notebook.name, "exec"), {"__name__": "__main__"})
    assert "forward_kl" in script and "policy" in capsys.readouterr().out


def test_refusals_are_read_from_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "hooks"))
    refusals = importlib.import_module("refusals")
    found = refusals.all_refusals()
    assert all(found.values())
    sentences = {refusal.sentence for section in found.values() for refusal in section}
    assert "`temperature=…` does not sample: set it above 0 (1.0 is the model's)." in sentences
    exact = found["Settings under which the result would not be the posterior"]
    entropy = next(refusal for refusal in exact if "entropy bonus" in refusal.sentence)
    assert entropy.reason.endswith("the fixed point is the posterior, without it.")  # a text that the module names
    assert "<!-- refusals -->" in (ROOT / "docs" / "refusals.md").read_text()
