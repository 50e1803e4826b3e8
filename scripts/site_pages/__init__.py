"""What make_docs and add_result are made of: pages that are made of the code and of results, and the form of a result.

markers        a made part of a page, between two comments
configuration  docs/configuration.md, from the docstrings of dataclasses
recipes        the tables of memory in docs/recipes/
results        a result: its form, what it must have, its file
dashboard      docs/results.md, of all results
plots          a trend as inline SVG
"""
