"""Greedy answers of a node, and how the reference judges them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from albireo.client import AsyncClient

CLOSE = 1e-3
"""Where the reference's two best logits are closer than this, either is right."""

Answers = list[list[int]]


async def _ask(node: str, texts: list[str], tokens: int) -> tuple[Answers, Answers, Answers]:
    async with await AsyncClient.connect(node=node) as client:
        prompts = [await client.tokenize(text) for text in texts]

        async def answer(prompt: list[int]) -> list[int]:
            done = await client.generate(prompt, max_tokens=tokens, temperature=0, ignore_eos=True)
            return done.token_ids

        at_once = list(await asyncio.gather(*(answer(prompt) for prompt in prompts)))
        one_by_one = [await answer(prompt) for prompt in prompts]
    return prompts, at_once, one_by_one


def ask(node: str, texts: list[str], tokens: int) -> tuple[Answers, Answers, Answers]:
    """Prompt ids; answers with all prompts in flight; answers one after the other."""
    return asyncio.run(_ask(node, texts, tokens))


@dataclass(frozen=True)
class Verdict:
    """tokens judged; those that differ where the reference is sure, described; close ones."""

    tokens: int
    wrong: list[str]
    close: int


class Judge:
    """Compares answers with the reference, position by position, on the answer's own prefix.

    One forward pass over prompt and answer gives the reference's logits
    everywhere.  If every token is the best one there, greedy decoding by the
    reference would have given the same answer.
    """

    def __init__(self, reference: PreTrainedModel) -> None:
        self._reference = reference
        self._best: dict[tuple[int, ...], list[tuple[int, float]]] = {}

    def judge(self, prompts: Answers, answers: Answers) -> Verdict:
        wrong: list[str] = []
        close = tokens = 0
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            for position, (token, (best, lead)) in enumerate(
                zip(answer, self._best_tokens(prompt, answer), strict=True)
            ):
                tokens += 1
                if token == best:
                    continue
                if lead < CLOSE:
                    close += 1
                else:
                    wrong.append(
                        f"prompt {number}, position {position}: {token}, but {best} leads by {lead}"
                    )
        return Verdict(tokens, wrong, close)

    @torch.inference_mode()
    def _best_tokens(self, prompt: list[int], answer: list[int]) -> list[tuple[int, float]]:
        """The best token at each position of the answer, and its lead over the second."""
        key = (*prompt, -1, *answer)
        if key not in self._best:
            logits = self._reference(torch.tensor([prompt + answer])).logits[0]
            best = logits[len(prompt) - 1 : -1].topk(2)
            leads = (best.values[:, 0] - best.values[:, 1]).tolist()
            self._best[key] = list(zip(best.indices[:, 0].tolist(), leads, strict=True))
        return self._best[key]
