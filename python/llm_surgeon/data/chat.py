"""Conversations of chat data, in either of the two dialects they are published in, as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_surgeon.errors import InputError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Roles of messages with role and content (OpenAI's dialect) and of those with from and value (ShareGPT's).
_ROLES = {name: name for name in ("system", "developer", "user", "assistant", "tool", "function", "ipython")} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """Messages with ``role`` and ``content``, and what else a chat template may ask for; ``where`` names their row."""

    where: str
    messages: list[dict[str, Any]]

    @classmethod
    def of(cls, value: Any, where: str, system: Any = None) -> Conversation:
        """The messages of a row's field, ``role``/``content`` or ``from``/``value``; :class:`InputError` otherwise.

        Text in ``system``, a field of its own in some data, is their first message unless they begin with such a one.
        """
        if not isinstance(value, list):
            raise InputError(f"{where} holds {_kind(value)} in place of a list of messages")
        messages = [_message(item, f"message {number} of {where}") for number, item in enumerate(value, 1)]
        if isinstance(system, str) and system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        return cls(where, messages)


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A conversation by the tokenizer's chat template.

    Without a template it is one paragraph a message, ``"User: …"``, ``"Assistant: …"``: the way dialogues stand in the
    text that base models were trained on.

    Raises:
        InputError: the template refuses it (roles that do not alternate, say).
    """
    if not has_template(tokenizer):
        spoken = [(message["role"], message["content"]) for message in conversation.messages]
        return "\n\n".join(f"{role.capitalize()}: {content}" for role, content in spoken if content)
    assert tokenizer is not None
    try:
        text = tokenizer.apply_chat_template(conversation.messages, tokenize=False)
    except Exception as error:  # a template is code of its own, and raises whatever it pleases
        raise InputError(f"the tokenizer's chat template refuses {conversation.where}: {one_line(error)}") from error
    assert isinstance(text, str)
    return text


def has_template(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """True where conversations are rendered by a template of the tokenizer's."""
    return bool(getattr(tokenizer, "chat_template", None))


def _message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise InputError(f"{where} is {_kind(item)}, not an object")
    given = {key: value for key, value in item.items() if value is not None}  # parquet fills what is missing
    role_key, content_key = ("role", "content") if "role" in given else ("from", "value")
    role = given.pop(role_key, None)
    if role is None:
        raise InputError(f"{where} has neither role and content nor from and value")
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise InputError(f"{where} has the unknown role {str(role)[:40]!r}: known are {', '.join(_ROLES)}")
    content = given.pop(content_key, None)
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if content is None and not given.get("tool_calls"):
        raise InputError(f"{where} has no {content_key}")
    if content is not None and not isinstance(content, str):
        raise InputError(f"the {content_key} of {where} is {_kind(content)}, not text")
    # What else is there (tool_calls, name) is for the template.
    return {**given, "role": _ROLES[role.lower()], "content": content}


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
    if kind != "text" or not isinstance(text, str):
        raise InputError(f"{where} holds a part of type {str(kind)[:40]!r}: only text can be read")
    return text


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    names: dict[type, str] = {str: "text", dict: "an object", list: "a list"}
    return names.get(type(value), "a truth value" if isinstance(value, bool) else "a number")
