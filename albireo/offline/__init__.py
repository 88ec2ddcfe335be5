"""Whole batches of prompts in one call, on a node of the caller's own."""

from .llm import LLM

__all__ = ["LLM"]
