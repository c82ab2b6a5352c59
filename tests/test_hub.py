"""The hub that other tests push to and load from takes and gives what the real client sends and expects."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hub
import tiny

MODEL = """if True:
    import sys
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    import tiny

    tiny.build("llama").push_to_hub("someone/llama")
    tiny.tokenizer().push_to_hub("someone/llama")
    model = AutoModelForCausalLM.from_pretrained("someone/llama")
    tokens = AutoTokenizer.from_pretrained("someone/llama")(tiny.TEXT, return_tensors="pt")["input_ids"]
    save_file({"logits": tiny.logits(model), "tokens": tokens}, sys.argv[1])
"""
FILES = """if True:
    import sys
    from pathlib import Path
    from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download

    def error(call, *arguments, **options):
        try:
            call(*arguments, **options)
        except errors.HfHubHTTPError as error:
            return type(error)

    api, source = HfApi(), Path(sys.argv[1])
    assert error(api.upload_folder, repo_id="someone/files", folder_path=source) is errors.RepositoryNotFoundError
    assert error(snapshot_download, "someone/files") is errors.RepositoryNotFoundError
    api.create_repo("someone/files")
    assert error(api.create_repo, "someone/files").__name__ == "HfHubHTTPError"
    assert error(HfApi(token="hf_other").upload_folder, repo_id="someone/files", folder_path=source)
    assert api.list_repo_files("someone/files") == []

    api.upload_folder(repo_id="someone/files", folder_path=source)
    names = {"README.md", "deep/er/weights.bin", "deep/empty"}
    assert set(api.list_repo_files("someone/files")) == names
    assert {file.rfilename for file in api.model_info("someone/files").siblings} == names
    snapshot = Path(snapshot_download("someone/files"))
    for name in names:
        assert (snapshot / name).read_bytes() == (source / name).read_bytes()
    assert error(hf_hub_download, "someone/files", "config.json") is errors.RemoteEntryNotFoundError
    assert error(hf_hub_download, "someone/files", "README.md", revision="v2") is errors.RevisionNotFoundError

    (source / "README.md").write_text("changed")
    (source / "deep/empty").unlink()
    api.upload_folder(repo_id="someone/files", folder_path=source, delete_patterns="*")
    assert set(api.list_repo_files("someone/files")) == names - {"deep/empty"}
    assert Path(hf_hub_download("someone/files", "README.md")).read_text() == "changed"
    assert (snapshot / "README.md").read_text() == "# Files"
"""


@pytest.fixture
def server(tmp_path):
    with hub.serve(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def run(server, tmp_path_factory):
    """Runs a script in a process and with a cache of its own; it must end well."""

    def run(script, *words):
        options = {"cwd": Path(__file__).parent, "env": server.environment(tmp_path_factory.mktemp("home"))}
        command = [sys.executable, "-c", script, *map(str, words)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
        assert ran.returncode == 0, ran.stderr

    return run


def test_a_pushed_model_loads_by_its_id(server, run, tmp_path):
    run(MODEL, tmp_path / "seen")
    names = {path.name for path in (server.root / "someone/llama").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    seen = load_file(tmp_path / "seen")
    assert torch.equal(seen["logits"], tiny.logits(tiny.build("llama")))
    assert seen["tokens"].tolist() == [tiny.tokenizer()(tiny.TEXT)["input_ids"]]
    assert {method for method, path in server.requests if path.endswith("/model.safetensors")} == {"HEAD", "GET"}
    assert not server.unknown


def test_files_come_and_go_and_what_is_missing_is_an_error(server, run, tmp_path):
    source = tmp_path / "source"
    (source / "deep/er").mkdir(parents=True)
    (source / "README.md").write_text("# Files")
    (source / "deep/empty").touch()
    (source / "deep/er/weights.bin").write_bytes(bytes(range(256)) * 1000)
    run(FILES, source)
    assert not server.unknown
