"""Run every snippet of a Markdown file, in order, in the current directory: `python snippets.py FILE`.

Python snippets of one file share their names, as a reader's session would. Of shell snippets each line must be a
`wellrounded` command, or one of those that install or serve, which are listed here.
"""

import io
import re
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

import datasets
import transformers

import tiny
from wellrounded.cli import main

NOT_RUN = ("pip install", "make ", "vllm serve", "python -m wellrounded.transformers ", "transformers chat")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def shell(line: str) -> None:
    """One command, which must succeed."""
    words = shlex.split(line, comments=True)
    if not words or line.startswith(NOT_RUN):
        return
    assert words[0] == "wellrounded", f"a command that nothing here runs: {line}"
    out = io.StringIO()
    with redirect_stdout(out):
        code = main(words[1:])
    assert code == 0, f"{line}: exit code {code}"
    assert out.getvalue().strip(), f"{line}: said nothing"


def run(path: Path) -> int:
    """The number of snippets that were run."""
    names, count = {"__name__": "__main__"}, 0
    for language, text in FENCE.findall(path.read_text()):
        if language == "python":
            exec(compile(text, f"{path.name}, snippet {count}", "exec"), names)
        elif language == "bash":
            for line in text.splitlines():
                shell(line)
        else:
            assert language in ("", "json"), f"a snippet in {language} is not run"
            continue
        count += 1
    return count


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    datasets.load_dataset = lambda *names, **options: [{"text": tiny.TEXT * 200}] * 10
    assert run(Path(sys.argv[1])) > 0
