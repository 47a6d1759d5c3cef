"""What is asked of a generation, and its tokens turned into text. No torch: mistakes are told before it loads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megalite.config.schema import LARGEST_SEED
from megalite.text.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen and when a text ends; ValueError for a value out of range.

    temperature 0 is greedy; top_k 0, top_p 1 and repetition_penalty 1 change nothing. Prompt i of a batch draws with
    seed + i, as it would alone with that seed. `stop`: texts before which a reply ends.
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
                f"repetition_penalty={self.repetition_penalty} must be greater than 0; 1 is none",
            ),
            (
                not 0 <= self.seed <= LARGEST_SEED,
                f"seed={self.seed} must be at least 0 and at most {LARGEST_SEED}, e.g. 1234",
            ),
            ("" in self.stop, "an empty stop string ends every text before it begins; leave it out"),
        ):
            if wrong:
                raise ValueError(message)


class StopStrings:
    """Text in pieces, cut before the first of `stop`; what may be the beginning of one is held back."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop, self.held, self.found = tuple(stop), "", False

    def push(self, text: str) -> str:
        """What of the text so far may be shown and has not been yet."""
        text = self.held + text
        at = min((found for each in self.stop if (found := text.find(each)) >= 0), default=-1)
        if at >= 0:
            self.found, self.held = True, ""
            return text[:at]
        # the longest end of the text that begins a stop string
        hold = max((n for each in self.stop for n in range(1, len(each)) if text.endswith(each[:n])), default=0)
        self.held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def finish(self) -> str:
        """What was held back: no stop string came of it."""
        held, self.held = self.held, ""
        return held


class Reply:
    """The continuation of one prompt, fed token by token. `ended`: why it is over; "" while it goes on.

    `limit`: tokens the model has positions for, prompt and reply together; None: no bound. ValueError for a prompt
    without a token or without room behind it.
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
            raise ValueError("the prompt is empty and the tokenizer has no token to begin a text with; give a prompt")
        if limit is not None and len(prompt) >= limit:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, but the model has {limit} positions, prompt and reply together; "
                f"give a prompt of at most {limit - 1} tokens"
            )
        self.prompt, self.ids, self.text, self.ended = list(prompt), list[int](), "", ""
        self._settings, self._limit = settings, limit
        self._stop_ids = set(stop_ids) | {
            token for each in settings.stop if (token := _control(tokenizer, each)) is not None
        }
        # without the prompt before it, a first word would lose its leading space
        self._decoder, self._stops = StreamDecoder(tokenizer, prompt), StopStrings(settings.stop)

    def push(self, token: int) -> str:
        """The text that `token` completes; sets `ended` where the reply ends with it."""
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
    """The id of a control token such as <|im_end|>, which never shows in decoded text; None for other texts."""
    ids = tokenizer.encode(text)
    return ids[0] if len(ids) == 1 and text.strip() and not tokenizer.decode(ids) else None


def in_order(pieces: Iterable[tuple[int, str]], replies: Sequence[Reply]) -> Iterator[tuple[int, str]]:
    """Pieces (reply number, text) of replies that come at once, so that each reply is told whole before the next.

    Every reply has a piece, though it may be "".
    """
    waiting = [""] * len(replies)
    told = 0
    for number, text in pieces:
        waiting[number] += text
        while told < len(replies):
            yield told, waiting[told]
            waiting[told] = ""
            if not replies[told].ended:
                break
            told += 1
