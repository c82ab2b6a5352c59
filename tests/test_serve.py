"""transformers' own command line on this engine, as the processes that users start."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
import transformers
from transformers import AutoTokenizer
from transformers.quantizers import auto

import wellrounded as wr

MESSAGES = [{"role": "user", "content": "The quick brown fox"}]
NEW = 8


def test_the_command_of_transformers_runs_registered(monkeypatch, capsys):
    from wellrounded.transformers import main

    monkeypatch.setenv("HF_HUB_DISABLE_UPDATE_CHECK", "1")
    monkeypatch.setattr(sys, "argv", ["transformers", "version"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code and transformers.__version__ in capsys.readouterr().out
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"].__module__ == "wellrounded.hf.quantizer"


@pytest.fixture
def server(quantized):
    """The address of a server of its own process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "wellrounded.transformers", "serve", str(quantized), "--port", str(port),
               "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_DISABLE_UPDATE_CHECK": "1"})
    address = f"http://localhost:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, "the server has stopped"
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except OSError:
                time.sleep(0.25)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def post(address, **body) -> str:
    """What the server answers to a chat."""
    data = json.dumps({"messages": MESSAGES, "max_tokens": NEW, **body}).encode()
    request = urllib.request.Request(f"{address}/v1/chat/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def test_a_quantized_directory_is_served_whole_and_in_pieces(server, quantized):
    tokenizer, model = AutoTokenizer.from_pretrained(quantized), wr.load(quantized, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=NEW, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    expected = tokenizer.decode(made, skip_special_tokens=True)
    whole = json.loads(post(server, model=str(quantized)))
    assert expected and whole["choices"][0]["message"]["content"] == expected
    lines = post(server, model=str(quantized), stream=True).splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in events]
    assert "".join(pieces) == expected and sum(map(bool, pieces)) > 1
