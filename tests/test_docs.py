"""What the README and the documents show is what works: every snippet is run, with tiny models under the names used."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hub
import snippets
import tiny

ROOT = Path(__file__).parents[1]
DOCUMENTS = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in
             path.read_text() or "```bash" in path.read_text()]  # fmt: skip
LONG = {"max_position_embeddings": 2048}  # the usual window must fit


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_snippet_runs(document, tmp_path):
    work = tmp_path / "work"
    for name in ("MODEL", "Qwen/Qwen3-0.6B"):
        tiny.save(tiny.build("llama", torch.bfloat16, **LONG), work / name)
    tiny.save(tiny.build("opt", torch.float16, **LONG), work / "facebook" / "opt-125m")
    (work / "test.txt").write_text(tiny.TEXT * 100)
    if document.name not in ("README.md",):
        tiny.quantize(work / "MODEL", work / "OUT")
    with hub.serve(tmp_path / "hub") as server:
        done = subprocess.run(
            [sys.executable, snippets.__file__, str(document)], cwd=work, env=server.environment(tmp_path / "home"),
            capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not server.unknown


def test_a_snippet_that_fails_is_noticed(tmp_path):
    for text in ("```python\nassert 1 == 2\n```", "```bash\nwellrounded inspect /no/where\n```", "```bash\nls\n```",
                 "```ruby\nputs 1\n```"):  # fmt: skip
        (tmp_path / "doc.md").write_text(text)
        with pytest.raises(AssertionError):
            snippets.run(tmp_path / "doc.md")
