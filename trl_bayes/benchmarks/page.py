"""Where findings go: one page of JSON, Markdown and a figure for the sections that are written together."""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..statistics.strict_json import strict_json
from .figure import divergence_figure
from .section import Findings, SectionArguments


_VERSIONS = ("trl_bayes", "trl", "transformers", "torch", "python")


@dataclass(eq=False)  # each is itself, and hashable
class Page:
    """
    The findings of some sections, and the files `<name>.json`, `<name>.md` and `<name>.png`.

    Args:
        name (`str`): of the files.
        folder (`Path`): of the files; it is there.
        machine (`dict[str, str]`): what the numbers depend on: processor, devices, versions.
        seconds (`float`, *optional*): that the sections have taken.
    """

    name: str
    folder: Path
    machine: Mapping[str, str]
    seconds: float = 0.0
    arguments: dict[str, SectionArguments] = field(default_factory=dict, init=False)
    findings: dict[str, Findings] = field(default_factory=dict, init=False)

    def add(self, section: str, arguments: SectionArguments, findings: Findings) -> None:
        """Puts what a section has found so far into the files, in place of what it had found before."""
        self.arguments[section], self.findings[section] = arguments, findings
        self.write()

    def write(self, figure: str | None = None) -> None:
        """Writes the JSON, which is strict, and the Markdown, with a link to the figure if there is one."""
        record = {
            "machine": dict(self.machine),
            "arguments": {section: asdict(args) for section, args in self.arguments.items()},
            "seconds": self.seconds,
            **{section: found.record for section, found in self.findings.items()},
        }
        text = json.dumps(strict_json(record), indent=1, allow_nan=False)
        (self.folder / f"{self.name}.json").write_text(text + "\n", encoding="utf-8")
        (self.folder / f"{self.name}.md").write_text(self.to_markdown(figure), encoding="utf-8")

    def finish(self) -> list[str]:
        """Draws the figure, if there is one, writes all and returns the names of the files."""
        written = [f"{self.name}.json", f"{self.name}.md"]
        if (png := self._figure()) is None:
            self.write()
            return written
        figure = f"{self.name}.png"
        (self.folder / figure).write_bytes(png)
        self.write(figure)
        return [*written, figure]

    def _figure(self) -> bytes | None:
        """That of all curves, or else a section's own: one that draws has its page for itself."""
        if curves := [each for found in self.findings.values() for each in found.curves]:
            return divergence_figure(curves)
        return next((found.figure for found in self.findings.values() if found.figure is not None), None)

    def to_markdown(self, figure: str | None = None) -> str:
        """What the sections found, under a line about the machine."""
        versions = ", ".join(f"{name} {self.machine[name]}" for name in _VERSIONS)
        parts = [
            "# Benchmarks of trl_bayes",
            f"{self.machine['processor']}, {self.machine['cores']} CPU cores; {versions}; "
            f"{self.seconds / 60:.1f} minutes in all. p: posterior, π: policy, π₀: prior; divergences in nats.",
            *(found.markdown for found in self.findings.values()),
        ]
        if figure is not None:
            own = any(found.figure is not None for found in self.findings.values())
            parts.append(
                f"![{'What was found' if own else 'KL(p‖π) against completions and against seconds'}]({figure})"
            )
        return "\n\n".join(part.strip() for part in parts) + "\n"


def processor_name() -> str:
    """The model of the processor, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
