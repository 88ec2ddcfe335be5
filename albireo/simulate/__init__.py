"""`albireo simulate`: the real scheduler and the real choice of a group, on virtual time.

workload.py    who asks when for what
profile.py     how long a step takes
group.py       one group: the Scheduler, and a device that only takes time
simulation.py  the node: GroupTable, groups, and the clock
histogram.py, report.py, plot.py    what comes out
"""
