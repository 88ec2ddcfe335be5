"""The OpenAI HTTP API of a node.

A gateway is one process of several that share the port.  It is a client of the
router like any other and knows nothing of groups.  process.py is its entry,
app.py finds the endpoint for a request; completions.py and chat.py answer with
tokens, which reach them through inbox.py and leave through events.py.
"""
