"""`make chaos`: a node under load while its processes are killed, stopped and starved.

plan.py    which fault hits which process while a request is in which phase
load.py    requests, each compared with an undisturbed run, token for token
faults.py  how a process is harmed
run.py     the story; __main__.py its command line and report
"""
