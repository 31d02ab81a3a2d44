"""Modules are found by a function that they define, without being imported."""

from pathlib import Path

from trl_bayes.command_line.discovery import modules_with


def test_modules_with_a_function(tmp_path: Path) -> None:
    (tmp_path / "two_words.py").write_text('"""Say something.\n\nMore."""\n\nraise ImportError\ndef run(): ...\n')
    (tmp_path / "other.py").write_text("class A:\n    def run(self): ...\n\nasync def main(): ...\n")
    (tmp_path / "silent.py").write_text("def run(): ...\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "third.py").write_text('"""Third."""\ndef run(): ...\n')
    assert modules_with("run", [tmp_path]) == {"silent": "", "two-words": "Say something."}
    assert list(modules_with("run", [str(tmp_path), tmp_path / "deep"])) == ["silent", "two-words", "third"]
    assert modules_with("main", [tmp_path]) == {}
