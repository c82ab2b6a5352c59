"""Chats in Hugging Face's form, and in the form of it that a model's own template understands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UsageError

ROLES = {"human": "user", "gpt": "assistant"}  # the names ShareGPT files use
PICTURE = ("image", "url", "path")  # where an entry of type "image" may have its picture
PRINTED = "{'type': 'text'"  # how a template shows a list of parts that it takes for a text

Chat = list[dict[str, Any]]


class Processor(NamedTuple):
    """What makes inputs of chats: the model's tokenizer, and `load`, which gives what reads pictures too, if any does.

    What `load` gives has an `image_processor` and the `apply_chat_template` of transformers' processors; it is loaded
    when the first picture comes.
    """

    tokenizer: Any
    load: Callable[[], Any] | None = None

    @classmethod
    def of(cls, given: Any) -> Processor:
        """`given` is one already, a processor as transformers has it, a tokenizer alone, or None."""
        if isinstance(given, cls):
            return given
        return cls(given.tokenizer, lambda: given) if _is_whole(given) else cls(given)

    def whole(self, name: str) -> Any:
        """What reads pictures; UsageError if nothing does, in which `name` is what the pictures are in."""
        whole = self.load() if self.load else None
        if whole is None or not _is_whole(whole):
            seen = "none was given" if whole is None and self.tokenizer is None else "only a tokenizer is there"
            raise UsageError(
                f"{name}: its chats hold pictures, which need the model's processor, and {seen}; "
                "pass tokenizer=AutoProcessor.from_pretrained(MODEL)"
            )
        return whole

    def template(self, name: str) -> Any:
        """The tokenizer if it has a chat template, else what reads pictures, which may be the one to have it."""
        if getattr(self.tokenizer, "chat_template", None):
            return self.tokenizer
        whole = self.load() if self.load else None
        if getattr(whole, "chat_template", None):
            return whole
        raise UsageError(f"{name}: chats need a chat template and this tokenizer has none; give texts instead")


def _is_whole(given: Any) -> bool:
    return hasattr(given, "tokenizer") and hasattr(given, "image_processor")


def plain(chat: Sequence[Mapping[str, Any]], where: str, folder: Path | None = None) -> Chat:
    """The same chat; contents are texts or lists of {"type": "text", "text"} and {"type": "image", "image"}.

    Pictures are as they came, or the path of a file; where it is relative, it starts at `folder`. Raises UsageError for
    content of other types, and for a file that does not exist.
    """
    turns = []
    for turn in chat:
        if "from" in turn and "role" not in turn:
            turn = {"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
        if isinstance(turn.get("content"), (list, tuple)):
            turn = {**turn, "content": [_part(part, where, folder or Path()) for part in turn["content"]]}
        turns.append(dict(turn))
    return turns


def _part(part: Any, where: str, folder: Path) -> dict[str, Any]:
    said = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    kind = said.get("type")
    if kind == "text" and isinstance(said.get("text"), str):
        return {"type": "text", "text": said["text"]}
    if kind != "image":
        seen = f"content of type {kind!r}" if kind not in (None, "text") else f"content {part!r:.80}"
        raise UsageError(
            f"{where}: {seen} is not supported; give {{'type': 'text', 'text'}} or {{'type': 'image', 'image'}}"
        )
    picture = next((said[key] for key in PICTURE if key in said), None)
    if picture is None:
        raise UsageError(f"{where}: an entry of type 'image' holds no picture; give it as 'image', an image or a path")
    if not isinstance(picture, (str, Path)):
        return {"type": "image", "image": picture}
    if "://" in str(picture) or str(picture).startswith("data:"):
        raise UsageError(f"{where}: {str(picture)[:80]!r} is not a file here; download it, and name the file")
    path = folder / Path(picture).expanduser()
    if not path.is_file():
        raise UsageError(f"{where}: no such picture: {path}")
    return {"type": "image", "image": path}


def with_pictures(chat: Sequence[Mapping[str, Any]], pictures: Sequence[Any], where: str) -> Chat:
    """The chat with the pictures of its row put, one after the other, where it says {"type": "image"} and no more."""
    left = list(pictures)

    def filled(part: Any) -> Any:
        bare = is_picture(part) and all(part.get(key) is None for key in PICTURE)
        return {"type": "image", "image": left.pop(0)} if bare and left else part

    contents = [(turn, turn.get("content")) for turn in chat]
    turns = [
        {**turn, "content": [filled(part) for part in content]} if isinstance(content, (list, tuple)) else dict(turn)
        for turn, content in contents
    ]
    if left:
        raise UsageError(
            f"{where}: {len(left)} of its {len(pictures)} images have no place in the chat; "
            "mark each by {'type': 'image'}"
        )
    return turns


def is_picture(part: Any) -> bool:
    """Whether this part of a content is a picture."""
    return isinstance(part, Mapping) and part.get("type") == "image"


def holds_pictures(chat: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any message of the chat has a picture in it."""
    contents = [turn.get("content") for turn in chat]
    return any(is_picture(part) for content in contents if isinstance(content, (list, tuple)) for part in content)


def render(chat: Chat, template: Any) -> tuple[Chat, str]:
    """The form of a plain chat of whose text the template leaves out the least, and what it makes of it.

    Many templates read contents of one form only, a text or a list, and pass over the other without a word. Raises what
    the template raises if it takes the chat in no form.
    """
    contents = [turn.get("content") for turn in _in_parts(chat)]
    texts = [part["text"].strip() for parts in contents if isinstance(parts, list) for part in parts if "text" in part]
    best: tuple[int, Chat, str] | None = None
    refusal: Exception | None = None
    for form in _forms(chat):
        try:
            text = template.apply_chat_template(form, tokenize=False)
        except Exception as error:  # templates are programs and refuse in their own words, with their own exceptions
            refusal = refusal or error
            continue
        printed = PRINTED in text and not any(PRINTED in one for one in texts)
        kept = -1 if printed else sum(one in text for one in texts)
        if best is None or kept > best[0]:
            best = kept, form, text
        if kept == len(texts):
            break
    if best is None:
        assert refusal is not None
        raise refusal
    return best[1:]


def _forms(chat: Chat) -> Iterator[Chat]:
    """The chat as it is, with lists only and with texts only; what reads pictures mostly expects lists."""
    if holds_pictures(chat):
        yield _in_parts(chat)
        yield chat
        return
    yield chat
    yield _in_parts(chat)
    contents = [(turn, turn.get("content")) for turn in chat]
    yield [
        {**turn, "content": "\n".join(part["text"] for part in content)} if isinstance(content, list) else turn
        for turn, content in contents
    ]


def _in_parts(chat: Chat) -> Chat:
    contents = [(turn, turn.get("content")) for turn in chat]
    return [
        {**turn, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else turn
        for turn, content in contents
    ]
