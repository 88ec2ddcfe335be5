"""The CPU's kernels: machine code made by numba, called with addresses.

    kernels.py       the Kernels interface: one method, one launch
    linear.py attention.py rope.py norm.py activation.py embedding.py experts.py
                     the item functions: what one thread does for item i
    tiles.py         where the rows, keys and values of an attention item are
    paging.py        memory layout of the KV cache
    threads.py       the team of threads that shares the items of a launch
    products.py      the one register-blocked product behind linear and attention
    simd.py          raw memory, bfloat16;  vectors.py  sixteen float32 at a time
    rows.py          rows to and from float32
    atomics.py       words shared by threads;  spin.py  waiting awake for one of a ring
    step_end.py      waiting for a step of the GPU: no kernel, but machine code as well

workers/machine_code.py compiles them, and keeps the code.  Item functions get
addresses, not arrays: a call from Python then costs a few microseconds, and one
machine code serves all shapes.
"""
