"""Prior samples on disk: drawn once, whatever is killed, and used only for what they were drawn for."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from trl_bayes.prior.samples import Draw, PriorSamples


INF, NAN = math.inf, math.nan
SETTINGS = {"model": "tiny", "rewards": ["length", "ends"], "temperature": 1.0, "max_completion_length": 8, "seed": 0}
KEYS = torch.tensor([2**59 + 1, 4, 2**59])
PROMPTS = ["a", "bb", "ccc"]


def make(folder: Path, **changes: Any) -> PriorSamples:
    arguments: dict[str, Any] = {"prompt_keys": KEYS, "num_samples": 10, "chunk_size": 4} | changes
    settings = arguments.pop("settings", SETTINGS)
    return PriorSamples(folder, settings, **arguments)


class Sampler:
    """Draws completions of random length; the first reward is the length, the second missing for the prompt "bb"."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[tuple[list[str], int]] = []
        self.fail_at = fail_at

    def __call__(self, rows: list[str], seed: int) -> Draw:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append((rows, seed))
        lengths = torch.randint(1, 1_000_000, (len(rows),))
        rewards = torch.stack([lengths.float(), (lengths % 2).float()], dim=1)
        rewards[[i for i, row in enumerate(rows) if row == "bb"], 1] = NAN
        ids = [[len(row)] * 2 for row in rows]
        return Draw(ids, -lengths.float() / 1e5, rewards, [f"{row} {n}" for row, n in zip(rows, lengths, strict=True)])


def collect(samples: PriorSamples, draw: Any = None, **arguments: Any) -> Any:
    draw = Sampler() if draw is None else draw
    samples.collect(draw, PROMPTS, progress=False, **arguments)
    return draw


def rows_on_disk(folder: Path) -> list[dict[str, Any]]:
    rows = [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    return sorted(rows, key=lambda row: row["sample"])


# -------------------------------------------------------------------------------------------------------------------
# Drawing and reading back


def test_every_sample_once(tmp_path: Path) -> None:
    samples = make(tmp_path)
    assert len(samples) == 30
    assert samples.missing().tolist() == list(range(30))
    sampler = collect(samples)
    assert samples.missing().tolist() == []
    rows = rows_on_disk(tmp_path)
    assert [row["sample"] for row in rows] == list(range(30))
    assert [row["prompt_key"] for row in rows] == [key for key in KEYS.tolist() for _ in range(10)]
    assert [row["text"].split()[0] for row in rows] == [prompt for prompt in PROMPTS for _ in range(10)]
    assert [row["completion_ids"] for row in rows] == [[n, n] for n in (1, 2, 3) for _ in range(10)]
    assert len(sampler.calls) == 8  # of 4 rows each, the last one filled up
    assert {len(drawn) for drawn, _ in sampler.calls} == {4}
    assert len({row["text"] for row in rows}) == 30


def test_scores(tmp_path: Path) -> None:
    samples = make(tmp_path)
    collect(samples)
    rows = rows_on_disk(tmp_path)
    prior = samples.scores()
    assert prior.rewards.shape == (3, 10, 2)
    assert prior.rewards.dtype == prior.log_prior.dtype == torch.float32
    assert torch.equal(prior.keys, KEYS)
    assert prior.rewards[..., 0].flatten().tolist() == [float(row["text"].split()[1]) for row in rows]
    assert prior.log_prior.flatten().tolist() == pytest.approx([row["log_prior"] for row in rows])
    assert prior.rewards[1, :, 1].isnan().all()
    assert not prior.rewards[[0, 2]].isnan().any()
    assert rows[10]["rewards"] == [pytest.approx(prior.rewards[1, 0, 0].item()), None]


def test_infinite_rewards_are_missing(tmp_path: Path) -> None:
    def draw(rows: list[str], seed: int) -> Draw:
        return Draw([[1]] * len(rows), torch.zeros(len(rows)), torch.tensor([[INF, 1.0]]).repeat(len(rows), 1))

    samples = make(tmp_path)
    collect(samples, draw)
    assert samples.scores().rewards[..., 0].isnan().all()
    assert rows_on_disk(tmp_path)[0]["text"] is None


def test_what_is_there_is_used_again(tmp_path: Path) -> None:
    collect(make(tmp_path))
    before = rows_on_disk(tmp_path)
    again = make(tmp_path, settings={**SETTINGS, "rewards": ("length", "ends")})  # a tuple is a list in JSON
    assert again.missing().tolist() == []
    assert collect(again).calls == []
    assert rows_on_disk(tmp_path) == before


def test_random_state_is_given_back_and_draws_do_not_repeat(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, other = collect(make(tmp_path / "one")), collect(make(tmp_path / "other"))
    assert torch.equal(torch.rand(3), expected)
    assert one.calls == other.calls
    assert rows_on_disk(tmp_path / "one") == rows_on_disk(tmp_path / "other")
    assert len({seed for _, seed in one.calls}) == 8
    reseeded = collect(make(tmp_path / "reseeded", settings={**SETTINGS, "seed": 1}))
    assert not {seed for _, seed in one.calls} & {seed for _, seed in reseeded.calls}


def test_progress_counts_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path).collect(Sampler(fail_at=5), PROMPTS)
    assert "20/30" in capsys.readouterr().err
    make(tmp_path).collect(Sampler(), PROMPTS)
    assert "30/30" in (shown := capsys.readouterr().err)
    assert "prior samples:  67%" in shown
    make(tmp_path / "second").collect(Sampler(), PROMPTS, process_index=1, num_processes=2)
    assert capsys.readouterr().err == ""


# -------------------------------------------------------------------------------------------------------------------
# Interrupted, killed, with several processes


@pytest.mark.parametrize("chunk_size", [3, 4, 7, 100])
def test_interrupted_anywhere_and_resumed(tmp_path: Path, chunk_size: int) -> None:
    """With another chunk size than before; what was there stays, what is new is not what was there."""
    for fail_at in (0, 1, 5):
        folder = tmp_path / str(fail_at)
        with pytest.raises(KeyboardInterrupt):
            collect(make(folder), Sampler(fail_at))
        before = rows_on_disk(folder)
        assert len(before) == 4 * fail_at
        samples = make(folder, chunk_size=chunk_size)
        assert samples.missing().tolist() == list(range(4 * fail_at, 30))
        with pytest.raises(ValueError, match=f"{30 - 4 * fail_at} of the 30 prior samples in .* have not been drawn"):
            samples.scores()
        collect(samples)
        after = rows_on_disk(folder)
        assert after[: len(before)] == before
        assert [row["sample"] for row in after] == list(range(30))
        assert len({row["text"] for row in after}) == 30


@pytest.mark.parametrize("num_processes", [2, 3, 8, 20])
def test_processes_share_the_work_and_draw_equally_often(tmp_path: Path, num_processes: int) -> None:
    """Run one after the other here, so that each one lists what is missing before the others add to it."""
    every = [make(tmp_path) for _ in range(num_processes)]
    pending = [samples.missing() for samples in every]
    for samples, missing in zip(every, pending, strict=True):
        samples.missing = lambda missing=missing: missing  # type: ignore[method-assign]
    barriers: list[int] = []
    samplers = [
        collect(samples, process_index=i, num_processes=num_processes, wait_for_everyone=lambda: barriers.append(1))
        for i, samples in enumerate(every)
    ]
    assert {len(sampler.calls) for sampler in samplers} == {math.ceil(8 / num_processes)}
    assert len(barriers) == 2 * num_processes
    assert [row["sample"] for row in rows_on_disk(tmp_path)] == list(range(30))
    collect(make(tmp_path / "alone"))
    assert rows_on_disk(tmp_path) == rows_on_disk(tmp_path / "alone")  # the number of processes makes no difference


def test_kill_9_loses_nothing_that_was_reported_done_and_doubles_nothing(tmp_path: Path) -> None:
    """Two kills at different moments, each while chunks are being drawn, then a run to the end."""
    script = textwrap.dedent(f"""
        import itertools, sys, time, torch
        from pathlib import Path
        from trl_bayes.prior.samples import Draw, PriorSamples

        calls = itertools.count(1)

        def draw(rows, seed):
            print(len(samples.missing()), flush=True)  # what is reported done: the rest
            if next(calls) == int(sys.argv[2]):
                time.sleep(600)  # until it is killed
            lengths = torch.randint(1, 1_000_000, (len(rows),)).float()
            return Draw([[1]] * len(rows), -lengths, lengths.unsqueeze(1), [str(n) for n in lengths.tolist()])

        samples = PriorSamples(Path(sys.argv[1]), {SETTINGS!r}, torch.tensor([3, 1, 2]), 100, 4)
        samples.collect(draw, ["a", "b", "c"], progress=False)
    """)
    command = [sys.executable, "-c", script, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    kept: list[dict[str, Any]] = []
    for chunks in (5, 20):
        with subprocess.Popen([*command, str(chunks)], stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            for _ in range(chunks):
                reported_missing = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        rows = rows_on_disk(tmp_path)
        assert len(rows) == 300 - reported_missing
        assert rows[: len(kept)] == kept
        kept = rows
    (tmp_path / ".samples-000000000299.parquet.left").write_bytes(b"half a file")
    sampler = Sampler()
    PriorSamples(tmp_path, SETTINGS, torch.tensor([3, 1, 2]), 100, 4).collect(sampler, PROMPTS, progress=False)
    assert len(sampler.calls) == (300 - len(kept)) // 4
    rows = rows_on_disk(tmp_path)
    assert rows[: len(kept)] == kept
    assert [row["sample"] for row in rows] == list(range(300))
    # Lengths of a million: a chunk that repeats an earlier one's random numbers would take away four
    assert len({row["rewards"][0] for row in rows}) > 296
    assert not list(tmp_path.glob(".*"))


def test_two_runs_that_overlap_do_not_double(tmp_path: Path) -> None:
    """A second job in the same folder, unaware of the first: the same samples twice on disk count once."""
    collect(make(tmp_path))
    first = make(tmp_path)
    first.missing = lambda: torch.arange(2, 30)  # type: ignore[method-assign]
    collect(first)
    assert len(rows_on_disk(tmp_path)) > 30
    samples = make(tmp_path)
    assert samples.missing().tolist() == []
    assert samples.scores().rewards.shape == (3, 10, 2)


# -------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"settings": {**SETTINGS, "model": "other"}},
            "are of model='tiny', but this run has model='other': use anot",
        ),
        (
            {"settings": {**SETTINGS, "rewards": ["length"]}},
            r"are of rewards=\['length', 'ends'\], but this run has rewards=\['length'\]: use another folder",
        ),
        ({"settings": {**SETTINGS, "temperature": 0.7}}, r"of temperature=1\.0, but this run has temperature=0\.7: "),
        ({"settings": {**SETTINGS, "min_p": 0.1}}, r"are of min_p=None, but this run has min_p=0\.1: "),
        ({"num_samples": 20}, "are of num_samples=10, but this run has num_samples=20: "),
        ({"prompt_keys": KEYS[:2]}, "are of prompts='[0-9a-f]{16}', but this run has prompts='[0-9a-f]{16}': "),
        ({"prompt_keys": KEYS[[1, 0, 2]]}, "are of prompts="),
        (
            {"settings": {**SETTINGS, "model": "other", "seed": 1}},
            "are of model='tiny', seed=0, but this run has model='other', seed=1: ",
        ),
    ],
)
def test_samples_of_something_else(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    collect(make(tmp_path))
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **changes)
    assert make(tmp_path).missing().tolist() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 1}, "`num_samples=1` is too few to learn from: set it to 2 or more."),
        ({"chunk_size": 0}, "`chunk_size=0` draws nothing: set it to 1 or more."),
        ({"prompt_keys": torch.tensor([], dtype=torch.int64)}, "There is no prompt to draw samples for"),
        ({"prompt_keys": torch.tensor([3, 3])}, "A prompt occurs twice in `prompt_keys`: give each prompt once."),
        ({"settings": {"model": object()}}, "The settings of prior samples must be plain values"),
    ],
)
def test_arguments_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **changes)


def test_prompts_that_do_not_match(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There are 1 prompts and 3 keys: give one for each"):
        make(tmp_path).collect(Sampler(), ["a"])


@pytest.mark.parametrize(
    "drawn",
    [
        Draw([[1]] * 3, torch.zeros(4), torch.zeros(4, 2)),
        Draw([[1]] * 4, torch.zeros(3), torch.zeros(4, 2)),
        Draw([[1]] * 4, torch.zeros(4), torch.zeros(4)),
        Draw([[1]] * 4, torch.zeros(4), torch.zeros(4, 2), ["a"]),
    ],
)
def test_a_draw_of_something_else(tmp_path: Path, drawn: Draw) -> None:
    with pytest.raises(ValueError, match="`draw` was given 4 rows and returned"):
        collect(make(tmp_path), lambda rows, seed: drawn)
    assert len(make(tmp_path).missing()) == 30


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    collect(make(tmp_path))
    (tmp_path / "samples-000000000004.parquet").write_bytes(b"not a table")
    with pytest.raises(
        ValueError, match=r"samples-000000000004\.parquet cannot be read .* delete it, and it is drawn"
    ):
        make(tmp_path).missing()
    (tmp_path / "samples-000000000004.parquet").unlink()
    assert make(tmp_path).missing().tolist() == [4, 5, 6, 7]

    settings = tmp_path / "settings.json"
    saved = json.loads(settings.read_text())
    settings.write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json is not valid JSON: use another folder"):
        make(tmp_path)
    settings.write_text(json.dumps(saved | {"num_samples": 2}))
    with pytest.raises(
        ValueError, match="has samples of other prompts: delete it, and what is missing is drawn again"
    ):
        make(tmp_path, num_samples=2).missing()
    settings.unlink()
    with pytest.raises(ValueError, match=r"has samples but no settings\.json that says of what: use another folder"):
        make(tmp_path)


def test_numbers_of_rewards_that_differ(tmp_path: Path) -> None:
    def draw(num_rewards: Sequence[int]) -> Any:
        left = list(num_rewards)
        return lambda rows, seed: Draw([[1]] * 4, torch.zeros(4), torch.zeros(4, left.pop()))

    samples = make(tmp_path)
    collect(samples, draw([1] * 7 + [2]))
    with pytest.raises(ValueError, match=r"have \[1, 2\] rewards each, which do not go together: use another folder"):
        samples.scores()
