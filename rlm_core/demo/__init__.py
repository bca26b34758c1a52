"""The main job with no key and no engine: a question about a text of 4 million characters.

`kjv.txt.xz` is the King James Version of the Bible (1769, public domain): a heading `== Book ==` before
each of 66 books, a line per verse. The LMs follow a script (`script.py`); all else is real.
"""
