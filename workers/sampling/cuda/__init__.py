"""Sampling on the GPU: the same tokens as the CPU sampler, from logits that stay on the device.

CudaSampler (sampler.py) is what other packages use.  Its kernels, in the order
in which a step launches them:

    scan       scan.py       the maximum of every tile of every row; finds NaN and infinities;
                             without filters, bounds of the tiles' scores too
    bound      bound.py      from those: a logit below which no filter's boundary lies
    histogram  histogram.py  counts and masses above it, for rows whose bound is loose
    select     histogram.py  the buckets in which the filters' boundaries lie
    collect    filters.py    the candidates: tokens that may be a boundary
    finish     filters.py    the threshold t: the filters keep the tokens with z >= t
    draw       draw.py       per tile, a bound of the scores of what is kept
    winner     draw.py       the best of the best, decided in float64
    decide     draw.py       the best over the ranks, where the vocabulary is sharded

Several ranks share this out by one of three modes (sampler.py): filtered rows of shards go
by candidates.py, rows that move by moving.py.  edits.py, masks.py and logprobs.py stand
before and behind, in the steps that ask for them.

Which of them run is fixed by the kind of step, and every grid by the number of
rows, so a graph can hold them.  A row that does not need a kernel leaves it at once.
"""

from .sampler import CudaSampler

__all__ = ["CudaSampler"]
