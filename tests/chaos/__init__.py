"""`make chaos`: a node under load while its processes are killed, stopped and starved.

plan.py    which fault hits which process while a request is in which phase, and what goes together
load.py    requests, each compared with an undisturbed run, token for token; wire.py: their way
wave.py    those of one visit, in places that are known
sight.py   how a phase is known: by the steps in the node's timelines
strike.py  aiming, holding up, striking; faults.py, full.py: how a process is harmed
node.py    the node, and its way back to health
checks.py  what must be true afterwards
run.py     the story; __main__.py its command line and report
"""
