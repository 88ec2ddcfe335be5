"""`albireo simulate`: the real scheduler and the real choice of a group, on virtual time.

workload.py    who asks when for what
profile.py     how long a step takes
fit.py         a profile from measured steps
group.py       one group: the Scheduler, and a device that only takes time
shard.py       some of the groups, in this process or another one
simulation.py  the node: GroupTable, and the clock
histogram.py, report.py, plot.py    what comes out
"""
