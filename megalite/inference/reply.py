"""Generation settings, and turning generated tokens into text. No torch, so mistakes are reported before it loads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megalite.config.schema import LARGEST_SEED
from megalite.text.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen and when a reply ends. Raises ValueError for a value out of range.

    temperature 0 is greedy; top_k 0, top_p 1 and repetition_penalty 1 have no effect. Prompt i of a batch is sampled
    with seed + i, as it would be alone with that seed. `stop`: texts that end a reply and are not part of it.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for wrong, message in (
            (self.max_new_tokens < 1, f"max_new_tokens={self.max_new_tokens} must be at least 1"),
            (not self.temperature >= 0, f"temperature={self.temperature} must not be negative; 0 is greedy"),
            (self.top_k < 0, f"top_k={self.top_k} must not be negative; 0 keeps all tokens"),
            (not 0 < self.top_p <= 1, f"top_p={self.top_p} must be greater than 0 and at most 1; 1 keeps all tokens"),
            (
                not self.repetition_penalty > 0,
                f"repetition_penalty={self.repetition_penalty} must be greater than 0; 1 has no effect",
            ),
            (
                not 0 <= self.seed <= LARGEST_SEED,
                f"seed={self.seed} must be at least 0 and at most {LARGEST_SEED}, e.g. 1234",
            ),
            ("" in self.stop, "an empty stop string would end every reply at once; remove it"),
        ):
            if wrong:
                raise ValueError(message)


class StopStrings:
    """Cuts streamed text before the first stop string; a possible beginning of one is held back."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop, self.held, self.found = tuple(stop), "", False

    def push(self, text: str) -> str:
        """Add `text`; returns the new text that may be shown."""
        text = self.held + text
        at = min((found for each in self.stop if (found := text.find(each)) >= 0), default=-1)
        if at >= 0:
            self.found, self.held = True, ""
            return text[:at]
        # the longest suffix of the text that is a prefix of a stop string
        hold = max((n for each in self.stop for n in range(1, len(each)) if text.endswith(each[:n])), default=0)
        self.held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def finish(self) -> str:
        """Return the text held back, which is no stop string after all."""
        held, self.held = self.held, ""
        return held


class Reply:
    """The continuation of one prompt, fed token by token.

    `ended`: why it ended, "" until then. `limit`: positions of the model, for prompt and reply together; None: no
    bound. Raises ValueError if the prompt is empty or leaves no room for a reply.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        settings: Settings,
        stop_ids: Iterable[int],
        limit: int | None = None,
    ) -> None:
        if not prompt:
            raise ValueError("the prompt is empty and the tokenizer has no token that begins a text; give a prompt")
        if limit is not None and len(prompt) >= limit:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, but the model has {limit} positions for prompt and reply "
                f"together; give a prompt of at most {limit - 1} tokens"
            )
        self.prompt, self.ids, self.text, self.ended = list(prompt), list[int](), "", ""
        self._settings, self._limit = settings, limit
        self._stop_ids = set(stop_ids) | {
            token for each in settings.stop if (token := _control(tokenizer, each)) is not None
        }
        # decoded without the prompt, the first word would lose its leading space
        self._decoder, self._stops = StreamDecoder(tokenizer, prompt), StopStrings(settings.stop)

    def push(self, token: int) -> str:
        """Add `token`; returns the text that it completes and sets `ended` if the reply ends with it."""
        assert not self.ended
        if token in self._stop_ids:
            self.ended = "stop token"
            return self._shown("", last=True)
        self.ids.append(token)
        text = self._stops.push(self._decoder.push(token))
        if self._stops.found:
            self.ended = "stop string"
        elif self._limit is not None and len(self.prompt) + len(self.ids) >= self._limit:
            self.ended = "context end"
        elif len(self.ids) >= self._settings.max_new_tokens:
            self.ended = "length"
        return self._shown(text, last=self.ended in ("context end", "length"))

    def _shown(self, text: str, last: bool) -> str:
        if last:
            text += self._stops.push(self._decoder.finish())
            text += "" if self._stops.found else self._stops.finish()
        self.text += text
        return text


def _control(tokenizer: Tokenizer, text: str) -> int | None:
    """The id if `text` is a control token such as <|im_end|>, which decoded text never contains; else None."""
    ids = tokenizer.encode(text)
    return ids[0] if len(ids) == 1 and text.strip() and not tokenizer.decode(ids) else None


def in_order(pieces: Iterable[tuple[int, str]], replies: Sequence[Reply]) -> Iterator[tuple[int, str]]:
    """Reorder pieces (reply number, text) of concurrent replies, so that each reply is complete before the next.

    Yields at least one piece per reply, possibly "".
    """
    waiting = [""] * len(replies)
    current = 0
    for number, text in pieces:
        waiting[number] += text
        while current < len(replies):
            yield current, waiting[current]
            waiting[current] = ""
            if not replies[current].ended:
                break
            current += 1
