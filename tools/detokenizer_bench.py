"""What a step costs the detokenizer: median, mean and 99th percentile of a step's time.

A step is what the process does between a result frame and the socket: rows to
Python numbers, tokens to text, stop conditions, pieces, msgpack.  The model is
--model (default: $ALBIREO_DEMO_MODEL); its own encoding of mixed text gives the
tokens.  Three cases: plain, with two stop strings, and the window stream that
tokenizers without a byte table need.  Prints a table, or one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import msgspec
import numpy as np

from albireo.ipc.messages import Output, Submit
from albireo.workers.detokenizer.detokenizer import Detokenizer
from albireo.workers.detokenizer.stream import TextStream, WindowStream, stream_factory
from albireo.workers.tokenizer.text_model import TextModel, load_text_model

SAMPLE = (
    "The scheduler emits the plan for step n+1 while n runs; 42 blocks are free.\n\n"
    "def f(x):\n    return x ** 2  # naïve, café, Straße\n"
    "今日は世界。 Привет, мир! 👩‍👩‍👧 🙂 "
)


def submission(request: int, max_tokens: int, stop: tuple[str, ...]) -> Submit:
    return Submit(
        request=request,
        prompt_ids=[1],
        max_tokens=max_tokens,
        min_tokens=0,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        seed=request,
        stop=stop,
        stop_token_ids=(2**30,),
        include_stop=False,
        skip_special_tokens=True,
    )


def measure(
    text: TextModel,
    new_stream: Callable[[bool], TextStream],
    ids: list[int],
    batch: int,
    steps: int,
    stop: bool,
) -> dict[str, float]:
    """Milliseconds of a step with `batch` running sequences, each at its own place in the text."""
    detokenizer = Detokenizer(new_stream, text.bytes_of, ())
    stops = ("\n\n\n", "<END>") if stop else ()
    for request in range(1, batch + 1):
        detokenizer.submit(submission(request, steps + 1, stops))
    encoder = msgspec.msgpack.Encoder()
    requests = np.arange(1, batch + 1)
    rows = np.ones((batch, 3), dtype=np.int32)
    rows[:, 0] = requests
    tokens = np.array(ids, dtype=np.int32)
    times_ms = []
    for step in range(steps):
        rows[:, 2] = tokens[(requests * 7 + step) % len(tokens)]
        begin = time.perf_counter()
        detokenizer.add_rows(rows.tolist())
        encoder.encode(Output(detokenizer.take_pieces()))
        times_ms.append((time.perf_counter() - begin) * 1e3)
    times_ms.sort()
    return {
        "median_ms": round(statistics.median(times_ms), 4),
        "mean_ms": round(statistics.fmean(times_ms), 4),
        "p99_ms": round(times_ms[int(len(times_ms) * 0.99)], 4),
    }


def run(text: TextModel, batch: int, steps: int) -> dict[str, dict[str, float]]:
    ids = text.encode(SAMPLE, add_special_tokens=False)
    streams = stream_factory(text, text.vocab_size)
    return {
        "plain": measure(text, streams, ids, batch, steps, False),
        "stop strings": measure(text, streams, ids, batch, steps, True),
        "window": measure(text, lambda skip: WindowStream(text, skip), ids, batch, steps, False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=os.environ.get("ALBIREO_DEMO_MODEL"))
    parser.add_argument("--batch", type=int, default=256, help="sequences a step")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if not options.model:
        parser.error("pass --model DIR|FILE.gguf or set ALBIREO_DEMO_MODEL")
    begin = time.perf_counter()
    text = load_text_model(options.model)
    load_s = round(time.perf_counter() - begin, 3)
    cases = run(text, options.batch, options.steps)
    if options.json:
        print(json.dumps({"batch": options.batch, "load_s": load_s, "cases": cases}))
        return
    print(f"tokenizer loaded in {load_s} s; {options.batch} sequences a step")
    for name, times in cases.items():
        print(
            f"{name:>14}: median {times['median_ms']:.3f} ms, mean {times['mean_ms']:.3f} ms, "
            f"p99 {times['p99_ms']:.3f} ms"
        )


if __name__ == "__main__":
    main()
