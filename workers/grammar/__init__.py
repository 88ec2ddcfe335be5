"""Structured output: from what a client asks to the bit masks of a step.

    compile.py     tokenizer process: a Grammar to the text that matchers are made of, checked
    tools.py       the same for the tools of a conversation
    vocabulary.py  the model's tokens as the matchers see them
    matchers.py    worker: the state of each slot's grammar, masks beside the forward pass

The matchers are llguidance's: Earley over lexemes, no tables by vocabulary, so a new schema
costs under a millisecond (docs/structured-output.md has the measurements).
"""
