"""What a node does right now, gathered once for `albireo top`, the gateway's page and /metrics.

    watch.py     asks the router for its status tree, and keeps what it said
    machine.py   what the tree cannot know: CPU time of processes, NVML's GPUs
    history.py   samples of the last half minute, and the changes between them
    picture.py   rates, percentiles and shares made of these: what is drawn

Nothing is asked while nobody looks.  Nothing here draws, and nothing waits on
the router's event loop or in a step.
"""
