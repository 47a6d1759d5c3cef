"""Turns a conversation into a prompt with the chat template, and finds the token that ends a turn. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from megalite.text.chat import ChatTemplate, find_template, turn_ends
from megalite.text.controls import controls_of, protect_controls, strip_marks
from megalite.text.messages import Conversation, Message
from megalite.text.tokenizer import Tokenizer


class Chat:
    """A conversation with one model.

    `template`: as data.template; None: the tokenizer's own. `stops`: the control token that the template writes after
    the assistant's message. Control strings inside messages are encoded as text, as in training. Raises ValueError if
    there is no template.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None, system: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(*find_template(template, tokenizer), tokenizer)
        self._controls = controls_of(tokenizer)
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.stops = turn_ends(self.template, tokenizer)

    def ask(self, content: str) -> list[int]:
        """Add a user message; returns the token ids of the prompt for the assistant's answer."""
        self.messages.append({"role": "user", "content": content})
        return self.prompt(self.messages)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of `messages` and the start of the assistant's answer."""
        conversation = Conversation("messages", list(messages), [None] * len(messages))
        if self._controls is not None:
            conversation, _, _ = protect_controls(conversation, self._render, self.tokenizer, self._controls)
        rendered = strip_marks(self._render(conversation))
        return self.tokenizer.encode_chat(rendered.text, rendered.ranges).ids

    def _render(self, conversation: Conversation) -> str:
        return self.template.prompt(conversation.messages, conversation.tools)

    def answered(self, content: str) -> None:
        """Add the assistant's answer."""
        self.messages.append({"role": "assistant", "content": content})
