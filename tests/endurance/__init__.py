"""`make storm` and `make soak`: a node that has had very many clients is as it was before.

node.py    a node of the `sim` device with all its doors open
watch.py   memory and open files of its processes, and whether they grow
storm.py   1,000 clients that connect, ask and vanish at random moments
soak.py    a day's requests in a quarter of an hour
"""
