"""Check a composed configuration before any weights are loaded and before any heavy import.

- `parts`, `stages`, `around`: the keys of each part, with types and ranges.
- `table`: which part may stand at which place of the configuration.
- `commands`: the top-level keys of each command, and the rules that involve two keys.
- `walk`: finds each key of a configuration and the field that it must fit.
- `kinds`: the types of fields, and the words for what a key must be.
- `interpolations`: what `${key}` refers to, and circles of such references.
- `unread`: keys that the user sets although nothing reads them.
- `sources`: how to fetch missing files.
"""
