"""The table and the figure of a study, from its evaluations and the logs of its trainings."""

import json
from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from study import slug  # noqa: E402


COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]  # Okabe and Ito
MARKERS = "osD^vP*X"
SMOOTHED = 320  # completions over which a curve is the mean
NAMED = 20  # valid answers of a prompt among which distinct names are counted


def write_report(runs: Path, methods: list[str], splits: list[str], seeds: list[int], out: Path, task: Any) -> None:
    """Writes `results.md`, `.json` and `.png` of what is done beside the recipes, and prints the table."""
    folders = {split: runs / f"measured_{split}" for split in splits}
    methods = [
        name for name in methods if all((of / slug(name) / "evaluation.json").exists() for of in folders.values())
    ]
    if not methods:
        raise SystemExit(
            f"Nothing has been measured in {runs} on {' and '.join(splits)}: do the parts train and measure."
        )
    rows = {split: read_rows(folder, methods, seeds, task) for split, folder in folders.items()}
    text = "\n\n".join(f"### {split}\n\n{table(rows[split], task['columns'])}" for split in splits) + "\n"
    (out / "results.md").write_text(text, encoding="utf-8")
    (out / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    logs = {name: curves(runs, name, seeds, task["completions"]) for name in methods}
    draw(rows[splits[0]], logs, task, out / "results.png")
    print(text)


def read_rows(folder: Path, methods: list[str], seeds: list[int], task: Any) -> dict[str, list[dict[str, Any]]]:
    """Numbers of each method, for the seeds that it has; of prior and exact posterior, where most samples are."""
    found = {
        name: json.loads((folder / slug(name) / "evaluation.json").read_text(encoding="utf-8")) for name in methods
    }
    best = max(methods, key=lambda name: len(lines_of(folder / slug(name) / "samples" / "prior.jsonl")))
    rows = {
        label: [numbers(found[best][who], folder / slug(best) / "samples" / f"{who}.jsonl", task)]
        for label, who in (("the prior", "prior"), ("the exact posterior", "posterior"))
    }
    for method, evaluation in found.items():
        runs = {run["name"]: run for run in evaluation["runs"]}
        names = [name for seed in seeds if (name := f"{slug(method)}_{seed}") in runs]
        samples = folder / slug(method) / "samples"
        rows[method] = [numbers(runs[name], samples / f"{name}.jsonl", task) for name in names]
    return rows


def lines_of(file: Path) -> list[str]:
    """One for each sample."""
    return file.read_text(encoding="utf-8").splitlines()


def numbers(record: dict[str, Any], samples: Path, task: Any) -> dict[str, Any]:
    """What the table has of one policy; what is not known is absent, and what few samples tell is in `rough`."""
    metrics = record["evaluation"]["metrics"]
    known = {key: metrics[key]["value"] for key in task["columns"] if key in metrics}
    lines = [json.loads(line) for line in lines_of(samples)]
    by_prompt: dict[str, list[Any]] = {}
    for line in lines:
        by_prompt.setdefault(json.dumps(line["prompt"]), []).append(line)
    found = {**known, "valid": mean(line["rewards"][0] == 1 for line in lines)}
    if "names" in task["columns"]:
        found["names"] = distinct_names(by_prompt)
    rough = [key for key in known if not metrics[key]["trusted"]]
    return {key: value for key, value in found.items() if value is not None} | {"rough": rough}


def distinct_names(by_prompt: dict[str, list[Any]]) -> float | None:
    """Distinct values of the first key among the first valid answers of a prompt, as a share of these."""
    shares = []
    for lines in by_prompt.values():
        valid = [json.loads(line["completion"][0]["content"]) for line in lines if line["rewards"][0] == 1][:NAMED]
        if len(valid) == NAMED:
            shares.append(len({str(next(iter(answer.values()))).strip().lower() for answer in valid}) / NAMED)
    return mean(shares) if shares else None


def curves(runs: Path, method: str, seeds: list[int], completions: int) -> list[tuple[list[float], list[float]]]:
    """Completions drawn and mean reward of each training, smoothed over 320 completions."""
    found = []
    for file in (runs / f"{slug(method)}_{seed}" / "trainer_state.json" for seed in seeds):
        if not file.exists():
            continue
        state = json.loads(file.read_text(encoding="utf-8"))
        log = [line for line in state["log_history"] if "reward" in line]
        of_update = completions / state["max_steps"]
        last = round(SMOOTHED / of_update)
        values = [mean(float(line["reward"]) for line in log[max(0, i + 1 - last) : i + 1]) for i in range(len(log))]
        found.append(([line["step"] * of_update for line in log], values))
    return found


def table(rows: dict[str, list[dict[str, Any]]], columns: dict[str, str]) -> str:
    """Medians over seeds, with the range in brackets; a question mark where the samples were few."""
    shown = [key for key in columns if any(key in run for runs in rows.values() for run in runs)]
    lines = [f"| | {' | '.join(columns[key] for key in shown)} |", f"|---{'|---:' * len(shown)}|"]
    for name, runs in rows.items():
        cells = []
        for key in shown:
            found = [run for run in runs if key in run]
            text = cell([run[key] for run in found], key in ("valid", "names"))
            cells.append(text + (" ?" if any(key in run["rough"] for run in found) else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(values: list[float], is_share: bool) -> str:
    """A median and the range; shares in percent."""
    if not values:
        return ""
    scale, digits = (100, 0) if is_share else (1, 2)
    text = f"{median(values) * scale:.{digits}f}" + (" %" if is_share else "")
    if len(values) > 1:
        text += f" ({min(values) * scale:.{digits}f} to {max(values) * scale:.{digits}f})"
    return text


def draw(rows: dict[str, list[dict[str, Any]]], logs: dict[str, Any], task: Any, file: Path) -> None:
    """Left: reward against completions. Right: valid share against distance from the prior, which all have."""
    y = task.get("y", "valid")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, (name, runs) in enumerate(logs.items()):
        length = min(len(values) for _, values in runs)
        left.plot(
            runs[0][0][:length],
            [median(values[step] for _, values in runs) for step in range(length)],
            color=COLORS[i],
            marker=MARKERS[i],
            markevery=5,
            label=name,
        )
        points = [(run["kl_prior"], run[y]) for run in rows[name] if "kl_prior" in run and y in run]
        right.scatter(*zip(*points, strict=True), color=COLORS[i], marker=MARKERS[i], label=name)
    for name, marker in (("the prior", "|"), ("the exact posterior", "x")):
        run = rows[name][0]
        if "kl_prior" in run:
            right.scatter(run["kl_prior"], run[y], color="k", marker=marker, s=120, label=name)
    left.set(xlabel="completions drawn", ylabel=f"{task['label']}, in training")
    right.set(xlabel="KL(π‖π₀), nats", ylabel=task["label"])
    right.legend(fontsize=7)
    figure.savefig(file, dpi=110)
