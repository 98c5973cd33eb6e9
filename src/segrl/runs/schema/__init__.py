"""What a composed configuration must hold, checked before any weight, and any heavy import, is loaded.

`parts`, `stages` and `around` hold the keys of every part with types and ranges, `table` says which part may
stand where, `commands` the keys of the top level and what must hold together. `walk` finds the keys of a
configuration, `kinds` says in words what a key must be, `sources` how a file that is missing is fetched.
"""
