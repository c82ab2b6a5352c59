"""What goes beside the weights when transformers saves or pushes a model that is packed."""

from __future__ import annotations

import shutil
import tempfile
from functools import wraps
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard

from .. import card
from .compiling import as_stored
from .head import refuse_saving
from .quantizer import Quantizer

BESIDE = ("README.md", "quantization_report.json")


def write_beside(model: Any, directory: Path) -> None:
    """quantize_config.json, the report, and a model card, unless the directory has a card already."""
    quantizer, config = model.hf_quantizer, model.config.quantization_config.to_dict()
    card.dump(directory / "quantize_config.json", config)
    if quantizer.report is not None:
        quantizer.report.out = str(directory)
        quantizer.report.size_bytes = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        card.dump(directory / BESIDE[1], quantizer.report.to_dict())
        text = card.card(quantizer.report)
    else:
        for name in BESIDE:  # what was said of these weights where they came from still holds
            path = quantizer.origin / name if quantizer.origin else None
            if path and path.is_file() and not (directory / name).exists():
                shutil.copyfile(path, directory / name)
        text = card.short_card(directory.name, config)
    if not (directory / BESIDE[0]).exists():
        (directory / BESIDE[0]).write_text(text, encoding="utf-8")


def with_everything(original: Any) -> Any:
    """transformers' `save_pretrained`, which for a packed model then also writes what stands in `write_beside`."""

    @wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        refuse_saving(self)
        if not _is_packed(self):
            with as_stored(self):
                original(self, save_directory, *args, push_to_hub=push_to_hub, **kwargs)
            return
        names = ("repo_id", "commit_message", "commit_description", "private", "create_pr", "revision")
        push = {name: kwargs.pop(name) for name in names if name in kwargs}
        with as_stored(self):
            original(self, save_directory, *args, **kwargs)
        directory = Path(save_directory)
        write_beside(self, directory)
        if push_to_hub:
            upload(directory, push.pop("repo_id", directory.name), token=kwargs.get("token"), **push)

    return save_pretrained


def with_own_card(original: Any) -> Any:
    """transformers' `push_to_hub`, which for a packed model then pushes its own model card."""

    @wraps(original)
    def push_to_hub(self: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if not _is_packed(self):
            return original(self, repo_id, *args, **kwargs)
        shard, tags = kwargs.pop("max_shard_size", "50GB"), kwargs.pop("tags", None)
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch, repo_id.rpartition("/")[2])
            self.save_pretrained(directory, max_shard_size=shard)
            if tags:
                page = ModelCard.load(directory / BESIDE[0])
                page.data.tags = [*dict.fromkeys([*(page.data.tags or []), *tags])]
                page.save(directory / BESIDE[0])
            return upload(directory, repo_id, *args, **kwargs)

    return push_to_hub


def upload(
    directory: Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Create the repository if need be, and commit every file of `directory`; a card that is there already stays."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    keep = [BESIDE[0]] if api.file_exists(repo_id, BESIDE[0]) else None
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=directory,
        commit_message=commit_message or "Upload a model quantized by wellrounded",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        ignore_patterns=keep,
    )


def _is_packed(model: Any) -> bool:
    adapters_only = getattr(model, "_hf_peft_config_loaded", False)
    return isinstance(getattr(model, "hf_quantizer", None), Quantizer) and not adapters_only
