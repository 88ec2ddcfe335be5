"""Reading timelines: rows of a node, stage times and the serial fraction, pictures of both.

    rows.py     every actor's records, read from the runtime directory
    stages.py   what they say about a group's steps
    capture.py  a stretch of a running node
    chrome.py   that stretch for Chrome and Perfetto; page.py: as one HTML page

Writing them is ipc/timeline.py.  No torch here.
"""
