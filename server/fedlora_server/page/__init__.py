"""The page report.html: one self-contained HTML file on a run, for the coordinator and whoever watches.

`account` gathers what happened, `charts` draws it, and `html` writes the page. The tracker
`fedlora_server.trackers.page` decides when.
"""

FILE = "report.html"
