"""`make fuzz`: 10 million random and mutated messages, without a crash, a hang or a leak.

mutate.py    messages that are nearly right, and bytes that are nearly frames or JSON
seeds.py     the right ones that they are made of
router.py    the router's sessions and the router behind them, in this process
gateway.py   the gateway's application, in this process
wire.py      fewer of them over the sockets of a real node
__main__.py  the command line and the report
"""
