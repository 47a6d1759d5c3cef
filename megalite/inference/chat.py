"""Conversations as prompts: the chat template's text, and the token that ends the assistant's turn. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from megalite.text.chat import ChatTemplate, control_pattern, find_template, turn_ends
from megalite.text.controls import keep_text, unmark
from megalite.text.messages import Conversation, Message
from megalite.text.tokenizer import Tokenizer


class Chat:
    """A conversation with one model. `template`: as data.template, None: the tokenizer's own.

    `stops`: the control token that the template writes behind what the assistant says. Control strings in messages
    are text, as in training. ValueError where there is no template.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None, system: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(*find_template(template, tokenizer), tokenizer)
        self._controls = control_pattern(tokenizer)
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.stops = turn_ends(self.template, tokenizer)

    def ask(self, content: str) -> list[int]:
        """Say `content` as the user; gives the tokens after which the assistant speaks."""
        self.messages.append({"role": "user", "content": content})
        return self.prompt(self.messages)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        conversation = Conversation("messages", list(messages), [None] * len(messages))
        if self._controls is not None:
            conversation, _, _ = keep_text(conversation, self._render, self.tokenizer, self._controls)
        there = unmark(self._render(conversation))
        return self.tokenizer.encode_chat(there.text, there.ranges).ids

    def _render(self, conversation: Conversation) -> str:
        return self.template.prompt(conversation.messages, conversation.tools)

    def answered(self, content: str) -> None:
        """Keep what the assistant has said."""
        self.messages.append({"role": "assistant", "content": content})
