"""The canary's prompt, for the reference and for the launcher, which has no torch."""

from __future__ import annotations

import random

CANARY_TOKENS = 8
PREFILL_CHUNK = 2048  # tokens of one step, vLLM's max_num_batched_tokens


def canary_prompt(window: int | None, context: int, vocabulary: int, seed: int = 0, length: int | None = None) -> list[int]:
    """Token ids on which a wrong window, rotary embedding or weight shows; a quarter longer than the window and than a chunk, or `length`.

    Words drawn by lot, and again and again among them a key of 8 tokens and what follows it: behind the window always one
    answer, inside the window always another; and the prompt ends with the key. So a right model goes by the second. With the
    window off, or wider, the first comes into sight; with a narrower one fewer of the second are left; and a wrong rotary
    embedding or wrong weights find none of them. A model without a window gets the prompt for window 4096. ValueError if window,
    `context` or `vocabulary` are too small for that.
    """
    window = window or 4096
    wanted = max(window, PREFILL_CHUNK) * 5 // 4 if length is None else length
    length = min(wanted, context - CANARY_TOKENS)
    near = window if window < length else length * 4 // 5
    if near < 64 or vocabulary < 64:
        raise ValueError(f"a window or context of {near} tokens or a vocabulary of {vocabulary} is too small for a canary")
    generator = random.Random(seed)  # noqa: S311 - no secret
    words_of = range(min(1000, vocabulary // 4), vocabulary // 2)  # all of Mistral's vocabularies have their special tokens below

    def words(count: int) -> list[int]:
        return generator.choices(words_of, k=count)

    key, distant, answer = words(8), words(8), words(8)
    behind = [token for _ in range(1 + length // 32) for token in (*key, *distant, *words(16))][: length - near]
    inside = [token for _ in range((near - 28) // 32) for token in (*key, *answer, *words(16))]
    return [*behind, *words(20), *inside, *words(near - 28 - len(inside)), *key]
