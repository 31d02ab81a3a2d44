"""Prior samples on disk: drawn once, whatever is killed, and found by whoever asks for the same."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from trl_bayes.prior import Draw, DrawIdentity, KeptCompletions, PriorSamples, Work


INF, NAN = math.inf, math.nan
IDENTITY = DrawIdentity("tiny", "0123", temperature=1.0, max_completion_length=8, stop_ids=[5, 2], seed=0)
KEYS = torch.tensor([2**59 + 1, 4, 2**59])
PROMPTS = ["a", "bb", "ccc"]
REWARDS = ["length", "odd"]


def make(folder: Path, **changes: Any) -> PriorSamples:
    arguments: dict[str, Any] = {"prompt_keys": KEYS, "rewards": REWARDS, "num_samples": 10, "chunk_size": 4} | changes
    return PriorSamples(folder, arguments.pop("identity", IDENTITY), **arguments)


def tell(rows: Sequence[str], lengths: torch.Tensor) -> torch.Tensor:
    """The first reward is the length, the second 1[it is odd], missing for the prompt "bb"."""
    rewards = torch.stack([lengths.float(), (lengths % 2).float()], dim=1)
    rewards[[i for i, row in enumerate(rows) if row == "bb"], 1] = NAN
    return rewards


class Sampler:
    """Draws completions of random length; `of_all` processes, of which the others' rewards are never read here."""

    def __init__(self, fail_at: int | None = None, of_all: int = 1) -> None:
        self.calls: list[tuple[list[str], int]] = []
        self.scored: list[tuple[list[str], list[Any]]] = []
        self.fail_at, self.of_all = fail_at, of_all

    def __call__(self, rows: list[str], seed: int) -> Draw:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append((rows, seed))
        lengths = torch.randint(1, 1_000_000, (len(rows),))
        ids = [[len(row), int(n) % 7] for row, n in zip(rows, lengths, strict=True)]
        texts = [f"{row} {n}" for row, n in zip(rows, lengths, strict=True)]
        drawn = KeptCompletions(ids, texts, [None] * len(rows), -lengths.float() / 1e5)
        return Draw(drawn, tell(rows, lengths).repeat(self.of_all, 1))

    def score(self, rows: list[str], kept: KeptCompletions) -> torch.Tensor:
        self.scored.append((rows, kept.given))
        lengths = torch.tensor([int(text.split()[1]) for text in kept.given])
        return tell(rows, lengths).repeat(self.of_all, 1)


def collect(samples: PriorSamples, sampler: Any = None, prompts: Sequence[str] = PROMPTS, **work: Any) -> Any:
    sampler = Sampler(of_all=work.get("num_processes", 1)) if sampler is None else sampler
    samples.collect(sampler, sampler.score, prompts, Work(progress=False, **work))
    return sampler


def rows_on_disk(folder: Path, kind: str = "samples") -> list[dict[str, Any]]:
    rows = [row for file in sorted(folder.rglob(f"{kind}-*.parquet")) for row in pq.read_table(file).to_pylist()]
    return sorted(rows, key=lambda row: (row["prompt_key"], row["number"]) if kind == "samples" else row["row_key"])


def drawn(folder: Path) -> list[tuple[int, int]]:
    return [(row["prompt_key"], row["number"]) for row in rows_on_disk(folder)]


def every(num_samples: int = 10, keys: torch.Tensor = KEYS) -> list[tuple[int, int]]:
    return [(key, number) for key in sorted(keys.tolist()) for number in range(num_samples)]


# -------------------------------------------------------------------------------------------------------------------
# Drawing and reading back


def test_every_sample_once(tmp_path: Path) -> None:
    samples = make(tmp_path)
    assert len(samples) == 30
    assert samples.missing().tolist() == list(range(30))
    sampler = collect(samples)
    assert samples.missing().tolist() == []
    rows = rows_on_disk(tmp_path)
    assert drawn(tmp_path) == every()
    prompt_of = dict(zip(KEYS.tolist(), PROMPTS, strict=True))
    for row in rows:
        prompt, length = row["text"].split()
        assert prompt == prompt_of[row["prompt_key"]]
        assert row["completion_ids"] == [len(prompt), int(length) % 7]
        assert row["log_prior"] == pytest.approx(-int(length) / 1e5)
    assert [len(rows) for rows, _ in sampler.calls] == [4] * 7 + [2]
    assert len({row["text"] for row in rows}) == 30
    kept = samples.completions()
    assert [text.split()[0] for text in kept.texts] == [prompt for prompt in PROMPTS for _ in range(10)]


def test_scores(tmp_path: Path) -> None:
    samples = make(tmp_path)
    collect(samples)
    kept, prior = samples.completions(), samples.scores(torch.tensor([7, 8, 9]), torch.tensor([2, 1, 0]))
    assert prior.rewards.shape == (3, 10, 2)
    assert prior.rewards.dtype == prior.log_prior.dtype == torch.float32
    assert (prior.keys.tolist(), prior.multiplicity.tolist()) == ([7, 8, 9], [2, 1, 0])
    lengths = [float(text.split()[1]) for text in kept.texts]
    assert prior.rewards[..., 0].flatten().tolist() == lengths
    assert prior.log_prior.flatten().tolist() == pytest.approx(kept.log_prior.tolist())
    assert prior.rewards[1, :, 1].isnan().all()
    assert not prior.rewards[[0, 2]].isnan().any()
    missing = [row for row in rows_on_disk(tmp_path, "rewards") if row["row_key"] == 4]
    assert len(missing) == 10 and all(row["odd"] is None and row["length"] > 0 for row in missing)


def test_infinite_rewards_are_missing(tmp_path: Path) -> None:
    class Infinite(Sampler):
        def __call__(self, rows: list[str], seed: int) -> Draw:
            return Draw(super().__call__(rows, seed).completions, torch.tensor([[INF, 1.0]]).repeat(len(rows), 1))

    samples = make(tmp_path)
    collect(samples, Infinite())
    assert samples.scores(torch.arange(3)).rewards[..., 0].isnan().all()


def test_without_any_reward(tmp_path: Path) -> None:
    """A target that reads none, such as the prior to a power."""

    class Plain(Sampler):
        def __call__(self, rows: list[str], seed: int) -> Draw:
            return Draw(super().__call__(rows, seed).completions, torch.zeros(len(rows), 0))

    samples = make(tmp_path, rewards=[])
    collect(samples, Plain())
    assert samples.scores(torch.arange(3)).rewards.shape == (3, 10, 0)
    assert samples.scores(torch.arange(3)).log_prior.isfinite().all()


def test_what_is_there_is_used_again(tmp_path: Path) -> None:
    collect(make(tmp_path))
    before = rows_on_disk(tmp_path)
    again = make(tmp_path, identity=replace(IDENTITY, stop_ids=(2, 5, 5), model="another name"))
    assert again.missing().tolist() == []
    sampler = collect(again)
    assert sampler.calls == sampler.scored == []
    assert rows_on_disk(tmp_path) == before


def test_messages_are_kept_as_they_were_given(tmp_path: Path) -> None:
    """What reward functions are given may be more than a text; it is read back as it was, to score it again."""
    given = [{"role": "assistant", "content": "é", "tool_calls": [{"n": 1}]}, {"role": "tool", "content": "2"}]

    class Chat(Sampler):
        def __call__(self, rows: list[str], seed: int) -> Draw:
            draw = super().__call__(rows, seed)
            messages = [given if row == "a" else None for row in rows]
            return draw._replace(completions=draw.completions._replace(messages=messages))

        def score(self, rows: list[str], kept: KeptCompletions) -> torch.Tensor:
            self.scored.append((rows, kept.given))
            return torch.zeros(len(rows), 1)

    collect(make(tmp_path), Chat())
    chat = Chat()
    collect(make(tmp_path, rewards=["other"]), chat)
    for rows, completions in chat.scored:
        for row, completion in zip(rows, completions, strict=True):
            assert completion == given if row == "a" else completion.startswith(row)


def test_what_json_cannot_hold_is_not_scored_again(tmp_path: Path) -> None:
    class WithImage(Sampler):
        def __call__(self, rows: list[str], seed: int) -> Draw:
            draw = super().__call__(rows, seed)
            messages = [[{"role": "tool", "content": object()}]] * len(rows)
            return draw._replace(completions=draw.completions._replace(messages=messages))

    collect(make(tmp_path), WithImage())
    assert collect(make(tmp_path)).calls == []  # with the same rewards there is nothing to score
    with pytest.raises(
        ValueError, match="contents that cannot be kept, such as images, so other rewards cannot score"
    ):
        collect(make(tmp_path, rewards=["other", "odd"]))


def test_random_state_is_given_back_and_draws_do_not_repeat(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, other = collect(make(tmp_path / "one")), collect(make(tmp_path / "other"))
    assert torch.equal(torch.rand(3), expected)
    assert one.calls == other.calls
    assert rows_on_disk(tmp_path / "one") == rows_on_disk(tmp_path / "other")
    assert len({seed for _, seed in one.calls}) == 8
    reseeded = collect(make(tmp_path / "one", identity=replace(IDENTITY, seed=1)))
    assert not {seed for _, seed in one.calls} & {seed for _, seed in reseeded.calls}


def test_progress_counts_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    def run(folder: Path, sampler: Sampler, work: Work | None = None, **changes: Any) -> str:
        make(folder, **changes).collect(sampler, sampler.score, PROMPTS, work)
        return capsys.readouterr().err

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Sampler(fail_at=5))
    assert "20/30" in capsys.readouterr().err
    shown = run(tmp_path, Sampler())
    assert "30/30" in shown and "prior samples:  67%" in shown and "scoring" not in shown
    assert "scoring prior samples: 100%" in run(tmp_path, Sampler(), rewards=["other", "odd"])
    assert run(tmp_path / "second", Sampler(of_all=2), Work(process_index=1, num_processes=2)) == ""


# -------------------------------------------------------------------------------------------------------------------
# Found by whoever asks for the same, and grown


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": "4567"},
        {"temperature": 0.7},
        {"max_completion_length": 9},
        {"stop_ids": [2]},
        {"seed": 1},
        {"tools": ["89ab"]},
    ],
)
def test_samples_of_something_else_stand_beside(tmp_path: Path, changes: dict[str, Any]) -> None:
    """They are not mistaken for this run's, and both are found again."""
    collect(make(tmp_path))
    first = rows_on_disk(tmp_path)
    other = make(tmp_path, identity=replace(IDENTITY, **changes))
    assert other.missing().tolist() == list(range(30))
    assert len(collect(other).calls) == 8
    assert collect(make(tmp_path)).calls == collect(make(tmp_path, identity=replace(IDENTITY, **changes))).calls == []
    assert rows_on_disk(make(tmp_path).folder) == first
    said = json.loads((other.folder / "settings.json").read_text())
    assert said == json.loads(json.dumps(replace(IDENTITY, **changes).to_dict()))


@pytest.mark.parametrize("fewer", [2, 7])
def test_more_and_fewer_samples(tmp_path: Path, fewer: int) -> None:
    """More are added to those that are there, of which fewer are the first of each prompt."""
    first = make(tmp_path, num_samples=fewer)
    collect(first)
    few = first.scores(torch.arange(3))
    more = make(tmp_path, num_samples=25)
    assert more.missing().tolist() == [25 * prompt + number for prompt in range(3) for number in range(fewer, 25)]
    sampler = collect(more)
    assert len(sampler.calls) == math.ceil(3 * (25 - fewer) / 4)
    assert drawn(tmp_path) == every(25)
    assert len({row["text"] for row in rows_on_disk(tmp_path)}) == 75
    for number in (fewer, 10):
        again = make(tmp_path, num_samples=number)
        assert collect(again).calls == []
        scores = again.scores(torch.arange(3))
        assert scores.rewards.shape == (3, number, 2)
        assert torch.equal(scores.rewards[:, :fewer].nan_to_num(), few.rewards.nan_to_num())
        assert torch.equal(scores.log_prior[:, :fewer], few.log_prior)


def test_other_prompts_and_another_order(tmp_path: Path) -> None:
    """Of a part of the prompts all is there; of more only the new ones are drawn; the order does not matter."""
    collect(make(tmp_path, prompt_keys=KEYS[:2]), prompts=PROMPTS[:2])
    sampler = collect(make(tmp_path))
    assert {row for rows, _ in sampler.calls for row in rows} == {"ccc"}
    turned = make(tmp_path, prompt_keys=KEYS[[2, 0]])
    assert turned.missing().tolist() == []
    assert [text.split()[0] for text in turned.completions().texts] == ["ccc"] * 10 + ["a"] * 10


def test_rows_with_the_same_prompt_take_different_samples(tmp_path: Path) -> None:
    """The rewards may differ by a column, and whoever averages over rows takes their samples for independent."""
    rows = {"prompt_keys": KEYS[[0, 1, 0]], "row_keys": torch.tensor([1, 2, 3])}
    samples = make(tmp_path, **rows)
    collect(samples, prompts=["a", "bb", "a"])
    texts = samples.completions().texts
    assert [text.split()[0] for text in texts] == ["a"] * 10 + ["bb"] * 10 + ["a"] * 10
    assert len(set(texts)) == 30
    assert drawn(tmp_path) == sorted([(4, n) for n in range(10)] + [(2**59 + 1, n) for n in range(20)])
    # A run with the prompt once and more samples uses all of them, and scores those that were another row's
    once = make(tmp_path, prompt_keys=KEYS[:1], row_keys=torch.tensor([1]), num_samples=20)
    sampler = collect(once, prompts=["a"])
    assert sampler.calls == []
    assert sum(len(set(texts)) for _, texts in sampler.scored) == 10


# -------------------------------------------------------------------------------------------------------------------
# Rewards


def test_other_rewards_score_what_is_there(tmp_path: Path) -> None:
    """Only those that changed are unknown; nothing is drawn; both are known afterwards."""
    collect(make(tmp_path))
    before = rows_on_disk(tmp_path)
    samples = make(tmp_path, rewards=["twice", "odd"])

    class Twice(Sampler):
        def score(self, rows: list[str], kept: KeptCompletions) -> torch.Tensor:
            return super().score(rows, kept) * torch.tensor([2.0, 1.0])

    sampler = collect(samples, Twice())
    assert sampler.calls == [] and len(sampler.scored) == 8
    assert rows_on_disk(tmp_path) == before
    old, new = make(tmp_path).scores(torch.arange(3)), samples.scores(torch.arange(3))
    assert torch.equal(new.rewards[..., 0], 2 * old.rewards[..., 0])
    assert torch.equal(new.rewards[..., 1].nan_to_num(), old.rewards[..., 1].nan_to_num())
    for rewards in (REWARDS, ["twice", "odd"], ["odd", "twice"], ["odd", "length", "twice"], ["length", "length"]):
        again = make(tmp_path, rewards=rewards)
        assert collect(again, Twice()).scored == []
        assert again.scores(torch.arange(3)).rewards.shape == (3, 10, len(rewards))
    turned = make(tmp_path, rewards=["odd", "twice"]).scores(torch.arange(3))
    assert torch.equal(turned.rewards[..., 1], new.rewards[..., 0])


@pytest.mark.parametrize("rewards", [["length", None], [None, "odd"], [None, None]])
def test_a_reward_that_cannot_be_recognized_scores_again_in_each_run(
    tmp_path: Path, rewards: list[str | None]
) -> None:
    first = make(tmp_path, rewards=rewards)
    assert collect(first).scored == []  # they were drawn, and scored, in this run
    scores = first.scores(torch.arange(3))
    assert collect(first).scored == []
    assert torch.equal(first.scores(torch.arange(3)).rewards.nan_to_num(), scores.rewards.nan_to_num())
    again = make(tmp_path, rewards=rewards)
    with pytest.raises(ValueError, match="30 of the 30 prior samples in .* have not been drawn and scored yet: call"):
        again.scores(torch.arange(3))
    sampler = collect(again)
    assert sampler.calls == [] and len(sampler.scored) == 8
    assert torch.equal(again.scores(torch.arange(3)).rewards.nan_to_num(), scores.rewards.nan_to_num())
    written = {name for row in rows_on_disk(tmp_path, "rewards") for name in row}
    assert written - {"row_key", "number", "completion_key"} == {each for each in rewards if each is not None}


def test_rewards_of_another_row_with_the_same_prompt_are_not_its_own(tmp_path: Path) -> None:
    """They may depend on the other columns."""
    collect(make(tmp_path, row_keys=torch.tensor([1, 2, 3])))
    assert len(collect(make(tmp_path, row_keys=torch.tensor([1, 2, 4]))).scored) == 3


def test_rewards_belong_to_the_completion_that_they_scored(tmp_path: Path) -> None:
    """A sample that was drawn again is another completion: the old one's rewards are not used for it."""
    collect(make(tmp_path))
    for file in tmp_path.rglob("samples-*.parquet"):
        file.unlink()

    class Other(Sampler):
        def __call__(self, rows: list[str], seed: int) -> Draw:
            torch.manual_seed(seed + 1)
            return super().__call__(rows, seed)

    samples = make(tmp_path)
    collect(samples, Other())
    lengths = [float(text.split()[1]) for text in samples.completions().texts]
    assert samples.scores(torch.arange(3)).rewards[..., 0].flatten().tolist() == lengths


# -------------------------------------------------------------------------------------------------------------------
# Interrupted, killed, with several processes


@pytest.mark.parametrize("chunk_size", [3, 4, 7, 100])
def test_interrupted_anywhere_and_resumed(tmp_path: Path, chunk_size: int) -> None:
    """With another chunk size than before; what was there stays, what is new is not what was there."""
    for fail_at in (0, 1, 5):
        folder = tmp_path / str(fail_at)
        with pytest.raises(KeyboardInterrupt):
            collect(make(folder), Sampler(fail_at))
        before = {row["text"] for row in rows_on_disk(folder)}
        assert len(before) == 4 * fail_at
        samples = make(folder, chunk_size=chunk_size)
        assert samples.missing().tolist() == list(range(4 * fail_at, 30))
        with pytest.raises(ValueError, match=f"{30 - 4 * fail_at} of the 30 prior samples in .* have not been drawn"):
            samples.scores(torch.arange(3))
        collect(samples)
        after = rows_on_disk(folder)
        assert before <= {row["text"] for row in after}
        assert drawn(folder) == every()
        assert len({row["text"] for row in after}) == 30


@pytest.mark.parametrize("fail_at", [0, 1, 5])
def test_interrupted_while_scoring(tmp_path: Path, fail_at: int) -> None:
    collect(make(tmp_path))

    class Fails(Sampler):
        def score(self, rows: list[str], kept: KeptCompletions) -> torch.Tensor:
            if len(self.scored) == fail_at:
                raise KeyboardInterrupt
            return super().score(rows, kept)

    with pytest.raises(KeyboardInterrupt):
        collect(make(tmp_path, rewards=["new", "odd"]), Fails())
    samples = make(tmp_path, rewards=["new", "odd"])
    with pytest.raises(
        ValueError, match=f"{30 - 4 * fail_at} of the 30 prior samples in .* have not been drawn and sc"
    ):
        samples.scores(torch.arange(3))
    assert len(collect(samples).scored) == 8 - fail_at
    lengths = [float(text.split()[1]) for text in samples.completions().texts]
    assert samples.scores(torch.arange(3)).rewards[..., 0].flatten().tolist() == lengths


@pytest.mark.parametrize("rewards", [REWARDS, ["new", "odd"]])
@pytest.mark.parametrize("num_processes", [2, 3, 8, 20])
def test_processes_share_the_work_and_work_equally_often(
    tmp_path: Path, num_processes: int, rewards: list[str]
) -> None:
    """Run one after the other here, so that each one lists what is missing before the others add to it."""
    if rewards != REWARDS:  # all is drawn, and to be scored
        collect(make(tmp_path))
    every_process = [make(tmp_path, rewards=rewards) for _ in range(num_processes)]
    for samples in every_process:
        freeze(samples)
    barriers: list[int] = []
    samplers = [
        collect(samples, process_index=i, num_processes=num_processes, wait_for_everyone=lambda: barriers.append(1))
        for i, samples in enumerate(every_process)
    ]
    worked = [sampler.calls if rewards == REWARDS else sampler.scored for sampler in samplers]
    assert {len(calls) for calls in worked} == {math.ceil(8 / num_processes)}
    assert {len(rows) for calls in worked for rows, _ in calls} == {4}  # filled up, so that all do the same
    assert len(barriers) == 2 * num_processes
    assert drawn(tmp_path) == every()
    collect(make(tmp_path / "alone", rewards=rewards))
    assert rows_on_disk(tmp_path / IDENTITY.fingerprint) == rows_on_disk(tmp_path / "alone")
    ours, alone = (make(folder, rewards=rewards).scores(torch.arange(3)) for folder in (tmp_path, tmp_path / "alone"))
    assert torch.equal(ours.rewards.nan_to_num(), alone.rewards.nan_to_num())


def freeze(samples: PriorSamples) -> None:
    """As if nobody had added anything since now."""
    store = samples._store
    index, rewards = store.samples(), store.rewards([each for each in samples.reward_fingerprints if each])
    store.samples = lambda: index  # type: ignore[method-assign]
    store.rewards = lambda fingerprints: rewards  # type: ignore[method-assign]


class TwoProcesses(Sampler):
    """The rewards of the chunks that two processes score in the same round, chunk 2 r and chunk 2 r + 1."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table, self.round = table, -1

    def score(self, rows: list[str], kept: KeptCompletions) -> torch.Tensor:
        self.round += 1
        return self.table[(8 * self.round + torch.arange(8)).clamp(max=29)]


def test_every_process_knows_rewards_that_are_not_kept(tmp_path: Path) -> None:
    """Of a function that cannot be recognized: each process gets those of all, round by round."""
    collect(make(tmp_path))
    table = torch.randn(30, 2)
    for process in (0, 1):
        samples = make(tmp_path, rewards=[None, None])
        collect(samples, TwoProcesses(table), process_index=process, num_processes=2)
        assert torch.equal(samples.scores(torch.arange(3)).rewards.view(30, 2), table)


def test_kill_9_loses_nothing_that_was_reported_done_and_doubles_nothing(tmp_path: Path) -> None:
    """Two kills at different moments, each while chunks are being drawn, then a run to the end."""
    script = textwrap.dedent(f"""
        import itertools, sys, time, torch
        from pathlib import Path
        from trl_bayes.prior import KeptCompletions, Draw, DrawIdentity, PriorSamples, Work

        calls = itertools.count(1)

        def draw(rows, seed):
            print(len(samples.missing()), flush=True)  # what is reported done: the rest
            if next(calls) == int(sys.argv[2]):
                time.sleep(600)  # until it is killed
            lengths = torch.randint(1, 1_000_000, (len(rows),)).float()
            texts = [str(n) for n in lengths.tolist()]
            return Draw(KeptCompletions([[1]] * len(rows), texts, [None] * len(rows), -lengths), lengths.unsqueeze(1))

        samples = PriorSamples(
            Path(sys.argv[1]), {IDENTITY!r}, torch.tensor([3, 1, 2]), rewards=["length"], num_samples=100, chunk_size=4
        )
        samples.collect(draw, None, ["a", "b", "c"], Work(progress=False))
    """)
    command = [sys.executable, "-c", script, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    kept: set[str] = set()
    for chunks in (5, 20):
        with subprocess.Popen([*command, str(chunks)], stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            for _ in range(chunks):
                reported_missing = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        rows = {row["text"] for row in rows_on_disk(tmp_path)}
        assert len(rows) == 300 - reported_missing
        assert kept <= rows
        kept = rows
    (tmp_path / IDENTITY.fingerprint / ".samples-000000000299.parquet.left").write_bytes(b"half a file")
    others = tmp_path / IDENTITY.fingerprint / ".samples-000000000298.parquet.new"
    others.write_bytes(b"half a file")  # of a run that goes on
    os.utime(others.with_name(".samples-000000000299.parquet.left"), (0, 0))

    class OfLength(Sampler):
        def __call__(self, rows: list[str], seed: int) -> Draw:
            draw = super().__call__(rows, seed)
            return draw._replace(rewards=draw.rewards[:, :1])

    sampler = OfLength()
    keys = torch.tensor([3, 1, 2])
    samples = PriorSamples(tmp_path, IDENTITY, keys, rewards=["length"], num_samples=100, chunk_size=4)
    collect(samples, sampler)
    assert len(sampler.calls) == (300 - len(kept)) // 4
    rows = {row["text"] for row in rows_on_disk(tmp_path)}
    assert kept <= rows
    assert drawn(tmp_path) == every(100, keys)
    # Lengths of a million: a chunk that repeats an earlier one's random numbers would take away four
    assert len(samples.scores(keys).rewards.unique()) > 296
    assert others.exists() and not others.with_name(".samples-000000000299.parquet.left").exists()


def test_a_second_run_waits_for_the_first_and_finds_its_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = Sampler()
    other_run = Thread(target=lambda: collect(make(tmp_path, chunk_size=6, rewards=["length", None]), second))
    first = Sampler()

    def draw(rows: list[str], seed: int) -> Draw:
        if not first.calls:
            other_run.start()
            other_run.join(timeout=0.5)
        return first(rows, seed)

    make(tmp_path).collect(draw, first.score, PROMPTS, Work(progress=False))
    other_run.join()
    assert drawn(tmp_path) == every() and second.calls == []
    assert capsys.readouterr().err.count("waiting for it") == 1


def test_two_runs_that_overlap_do_not_double(tmp_path: Path) -> None:
    """A second job in the same folder, unaware of the first: one of two samples counts, and has its own rewards."""
    unaware = make(tmp_path, chunk_size=3)
    freeze(unaware)
    collect(make(tmp_path))
    collect(unaware)
    assert len(rows_on_disk(tmp_path)) > 30
    samples = make(tmp_path)
    assert samples.missing().tolist() == []
    lengths = [float(text.split()[1]) for text in samples.completions().texts]
    assert samples.scores(torch.arange(3)).rewards[..., 0].flatten().tolist() == lengths
    assert collect(make(tmp_path)).scored == []


# -------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 1}, "`num_samples=1` is too few to learn from: set it to 2 or more."),
        ({"chunk_size": 0}, "`chunk_size=0` draws nothing: set it to 1 or more."),
        ({"prompt_keys": torch.tensor([], dtype=torch.int64)}, "There is no prompt to draw samples for"),
        ({"row_keys": torch.tensor([3, 3])}, "`prompt_keys` and `row_keys` must have one entry for each row."),
    ],
)
def test_arguments_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **changes)


def test_rows_that_do_not_match(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There are 1 rows and 3 keys: give one for each"):
        make(tmp_path).collect(Sampler(), Sampler().score, ["a"])


FOUR = KeptCompletions([[1]] * 4, ["a"] * 4, [None] * 4, torch.zeros(4))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Draw(FOUR._replace(completion_ids=[[1]] * 3), torch.zeros(4, 2)), "`draw` was given 4 rows and returned"),
        (Draw(FOUR._replace(texts=["a"]), torch.zeros(4, 2)), "`draw` was given 4 rows and returned"),
        (Draw(FOUR._replace(messages=[]), torch.zeros(4, 2)), "`draw` was given 4 rows and returned"),
        (Draw(FOUR._replace(log_prior=torch.zeros(4, 1)), torch.zeros(4, 2)), "`draw` was given 4 rows and returned"),
        (Draw(FOUR, torch.zeros(4)), r"have shape \(4,\): return those of all processes, \(4, 2\)"),
        (Draw(FOUR, torch.zeros(4, 3)), r"have shape \(4, 3\): return those of all processes, \(4, 2\)"),
    ],
)
def test_a_draw_of_something_else(tmp_path: Path, wrong: Draw, message: str) -> None:
    def draw(rows: list[str], seed: int) -> Draw:
        return wrong

    with pytest.raises(ValueError, match=message):
        make(tmp_path).collect(draw, Sampler().score, PROMPTS, Work(progress=False))
    assert len(make(tmp_path).missing()) == 30


def test_scores_of_something_else(tmp_path: Path) -> None:
    collect(make(tmp_path))

    def score(rows: list[str], kept: KeptCompletions) -> torch.Tensor:
        return torch.zeros(3, 2)

    with pytest.raises(ValueError, match=r"have shape \(3, 2\): return those of all processes, \(4, 2\)"):
        make(tmp_path, rewards=["new", "odd"]).collect(Sampler(), score, PROMPTS, Work(progress=False))


@pytest.mark.parametrize("kind", ["samples", "rewards"])
def test_a_file_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    collect(make(tmp_path))
    file = sorted(tmp_path.rglob(f"{kind}-*.parquet"))[2]
    file.write_bytes(b"not a table")
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read .* delete it, and it is made again\."):
        collect(make(tmp_path))
    file.unlink()
    sampler = collect(make(tmp_path))
    assert (len(sampler.calls), len(sampler.scored)) == ((1, 0) if kind == "samples" else (0, 1))


@pytest.mark.parametrize(
    "change", [lambda said: "{", lambda said: "{}", lambda said: json.dumps({**said, "seed": 5}), lambda said: "[1]"]
)
def test_settings_that_are_not_of_this_folder(tmp_path: Path, change: Callable[[dict[str, Any]], str]) -> None:
    collect(make(tmp_path))
    settings = make(tmp_path).folder / "settings.json"
    settings.write_text(change(json.loads(settings.read_text())))
    with pytest.raises(ValueError, match=r"settings\.json does not say what the samples beside it are of: delete "):
        make(tmp_path)
